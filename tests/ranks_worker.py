"""Work of two ranks in test_tensor.py (forks) and test_parallel_gpu.py (torchrun): decode, and write the results."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from time import sleep
from typing import Any

import torch
from curious import Curious, signals_of
from safetensors.torch import save_file
from torch import Tensor

from specvlm.app.cli import guarded
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.decoding.lossless import compare
from specvlm.decoding.remote import RemoteDrafter, draft_process
from specvlm.engine import Engine
from specvlm.engine.base import tree_pass
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.load import load, skeleton
from specvlm.models.passes import Work
from specvlm.models.video_lm import VideoLM
from specvlm.parallel import torchrun
from specvlm.parallel.ranks import SINGLE, ProcessGroup, joined
from specvlm.results.metrics import tokens_of
from specvlm.strategies import DraftContext
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.overlap import OverlapDrafter, OverlapSession
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.random import RandomPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import DraftTree, GenerationOptions, Step, TreeShape, VideoPrompt
from specvlm.video.clips import find_clip
from specvlm.video.video import read_video

FAMILIES = ("qwen2_5_vl", "llava_onevision")
LIMIT = 20
FRAMES = 4  # a quarter of what the models take
SAMPLING = SamplingVerifier(temperature=0.8, top_k=20)
CASES = (
    ("tree", "lone", TwoStagePruner(), TreeDrafter(), GreedyVerifier()),
    ("chain", "shared", TwoStagePruner(), TreeDrafter("chain:5"), GreedyVerifier()),
    ("self", "lone", RandomPruner(), SelfDrafter("chain:3"), GreedyVerifier()),
    ("prompt_lookup", "lone", RandomPruner(), PromptLookupDrafter(), GreedyVerifier()),
    ("dynamic", "lone", RandomPruner(), DynamicTreeDrafter(nodes=12, depth=4, width=4), GreedyVerifier()),
    ("sparse", "lone", RandomPruner(), SparseDrafter(entries=256, length=3), GreedyVerifier()),
    ("sampled", "lone", RandomPruner(), TreeDrafter("3x2"), SAMPLING),
    ("coupled", "lone", RandomPruner(), TreeDrafter("3x2"), CoupledVerifier(0.8, top_k=20)),
    ("overlap", "lone", TwoStagePruner(), OverlapDrafter("chain:4", ahead=5), GreedyVerifier()),
    ("overlap_shared", "shared", TwoStagePruner(), OverlapDrafter("2x2", ahead=2), GreedyVerifier()),
)
OF_ONE_ENGINE = ("self", "sparse", "prompt_lookup")


def device() -> torch.device:
    return torch.device("cuda", torchrun.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def model(family: str, name: str, ranks: ProcessGroup) -> VideoLM:
    return load(model_folder(f"embedded:{family}/{name}"), "float32", str(device()), ranks=ranks)


def prompt_for(target: VideoLM) -> VideoPrompt:
    return target.prompt("describe the video.", [read_video(find_clip("synthetic_1"), frames=FRAMES)])


def engines(lone: bool) -> dict[str, Engine]:
    captured = GraphsEngine("cudagraph" if torch.cuda.is_available() else "direct")
    return {"eager": Engine()} if lone else {"eager": Engine(), "captured": captured}


def answers(family: str, ranks: ProcessGroup, every: bool = True) -> dict[str, list[int]]:
    """Return by case the tokens, and what each round accepted. In one process, only eager.

    every: Each case with both engines; else with one of them, in the other family with the other one.
    """
    target = model(family, "target", ranks)
    prompt, found = prompt_for(target), {}
    folder = model_folder(f"embedded:{family}/plain")
    lone = model(family, "plain", SINGLE) if ranks.rank == 0 else skeleton(folder)  # a draft on the first rank alone
    drafts = {"lone": lone, "shared": model(family, "plain", ranks)} if ranks.size > 1 else {"lone": lone, "shared": lone}
    for name, engine in engines(ranks.size == 1).items():
        steps = list(autoregressive(target, prompt, LIMIT, GreedyVerifier(), engine=engine))
        found[f"autoregressive {name}"] = tokens_of(steps)
        turn = FAMILIES.index(family) + (engine.name == "eager")
        for number, (case, draft, pruner, drafter, verifier) in enumerate(CASES):
            if not every and case not in ("sampled", *OF_ONE_ENGINE) and (number + turn) % 2:
                continue
            if ranks.size > 1 and case in OF_ONE_ENGINE and (engine.name == "eager" or family != FAMILIES[0]):
                continue  # the same passes of the same target
            graph = DecodingGraph(target, drafts[draft], pruner, drafter, verifier, GenerationOptions(ratio=0.9), engine=engine)
            steps = list(graph.decode(prompt, LIMIT))
            found[f"{case} {name}"] = [*tokens_of(steps), *(-1 - step.accepted for step in steps)]
    alone = found["autoregressive eager"]
    other = [*alone[:-1], (alone[-1] + 1) % target.vocabulary]
    found["compare"] = [compare(target, prompt, alone, other).verdict == "mismatch"]
    return found


def signals(family: str, ranks: ProcessGroup) -> dict[str, Tensor]:
    """Gather every signal of the target."""
    target = model(family, "target", ranks)
    found, _ = signals_of(target, prompt_for(target), Curious())
    return {f"{family}.{name}": signal.contiguous() for name, signal in found.items()}


def quantised(ranks: ProcessGroup) -> dict[str, list[int]]:
    """Compare both engines, drafted or not; shards are quantised otherwise than the model of one process."""
    folder, found = model_folder("embedded:llava_onevision/target"), {}
    target = load(folder, "float32", str(device()), weights="int8", ranks=ranks)
    prompt = prompt_for(target)
    for name, engine in engines(lone=False).items():
        found[f"alone {name}"] = tokens_of(list(autoregressive(target, prompt, 12, GreedyVerifier(), engine=engine)))
        graph = DecodingGraph(
            target,
            None,
            TwoStagePruner(),
            SelfDrafter("chain:3"),
            GreedyVerifier(),
            GenerationOptions(ratio=0.9),
            engine=engine,
        )
        found[f"drafted {name}"] = tokens_of(list(graph.decode(prompt, 12)))
    return found


class Killed(OverlapDrafter):
    """Kills its process while it guesses on."""

    def start(self, ctx: DraftContext) -> OverlapSession:
        session = super().start(ctx)
        real, count = session.guess_on, iter(range(10**6))

        def guess_on(done: Callable[[], bool]) -> Work[None]:
            yield from real(done)
            if next(count) == 2:
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        session.guess_on = guess_on
        return session


def draft_until_killed(ranks: ProcessGroup, mark: Path) -> None:
    """Decode until rank 0, which drafts, is killed during a check."""
    target, engine = model("qwen2_5_vl", "target", ranks), engines(lone=False)["captured"]
    folder = model_folder("embedded:qwen2_5_vl/plain")
    draft = model("qwen2_5_vl", "plain", SINGLE) if ranks.rank == 0 else skeleton(folder)
    drafter = Killed("chain:3", ahead=2)
    object.__setattr__(drafter, "mark", mark)
    for _ in DecodingGraph(target, draft, RandomPruner(), drafter, GreedyVerifier(), engine=engine).decode(
        prompt_for(target), 60
    ):
        pass


def apart_models(family: str, kill: bool) -> tuple[VideoLM, VideoLM]:
    """Load what the draft's own process needs. kill: It is killed in its 20th pass."""
    draft, passes = load(model_folder(f"embedded:{family}/plain"), "float32"), count(1)
    real = draft.append_hidden

    def append_hidden(*given: Any) -> Tensor:
        if kill and next(passes) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    draft.append_hidden = append_hidden
    return skeleton(model_folder(f"embedded:{family}/target")), draft


def apart(family: str, how: str, folder: Path) -> int:
    """Decode with a target over all ranks, and a draft in a process of its own that rank 0 starts.

    how: "decode", or "draft" or "rank" to have the draft's process or rank 1 killed.
    """
    rank = int(os.environ["RANK"])
    started = draft_process(partial(apart_models, family, how == "draft"), how="fork") if not rank else nullcontext()
    with started as link, joined(device()) as ranks:
        if not rank:
            (child,) = multiprocessing.active_children()
            (folder / "pid").write_text(str(child.pid))
        target, draft = model(family, "target", ranks), skeleton(model_folder(f"embedded:{family}/plain"))
        drafter = RemoteDrafter(OverlapDrafter("chain:4"), link)
        graph = DecodingGraph(target, draft, TwoStagePruner(), drafter, GreedyVerifier(), GenerationOptions(ratio=0.9))
        steps: list[Step] = []
        for step in graph.decode(prompt_for(target), 60):
            steps.append(step)
            if how == "rank" and rank and len(steps) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        found = [tokens_of(steps), [step.accepted for step in steps], [step.ahead for step in steps]]
        (folder / f"{rank}.json").write_text(json.dumps(found))
    return 0


def decode_for_ever(ranks: ProcessGroup, how: str, mark: Path) -> None:
    """Decode until rank 1 kills itself, or raises, in the middle."""
    target = model("qwen2_5_vl", "target", ranks)
    prompt, rounds, engine = prompt_for(target), 0, engines(lone=False)["captured"]
    while True:
        for _ in autoregressive(target, prompt, LIMIT, GreedyVerifier(), engine=engine):
            rounds += 1
            if rounds == 20 and ranks.rank == 1:
                mark.touch()
                if how == "raise":
                    raise RuntimeError("the second rank has had enough")
                os.kill(os.getpid(), signal.SIGKILL)
            sleep(0.001)


@torch.inference_mode()
def kernel_errors(ranks: ProcessGroup) -> list[float]:
    """Compare the captured kernels' tree logits with those of Hugging Face's modules, both sharded, in bfloat16."""
    from experiments.gpu_pair.models import wrap_of
    from experiments.gpu_pair.shapes import Llava, Text, build, prompt_of
    from specvlm.engine.cuda_graphs import kernels_for
    from specvlm.engine.lean import LeanText, Sight
    from specvlm.engine.program import Program

    shape, found = Llava(Text(4, 1024, 8, 4, 2048, 4096), small=True), []
    lm = build(shape, wrap_of(shape.family), device(), torch.bfloat16, ranks=ranks)
    prompt, tree = prompt_of(lm, shape, 512, True), DraftTree(torch.arange(10, 36), TreeShape.parse("paper").parents)
    cache, lean = lm.new_cache(1024), LeanText(lm)
    lean.ops = kernels_for(lm, lean)
    assert lean.ops.__name__.endswith("kernels")
    lm.prefill(lm.embed(prompt, lm.features(prompt)), lm.positions(prompt), cache, prompt.cut)
    base, offset = cache.length, cache.offset
    seen, depths = tree.mask.to(lm.device, torch.int8), torch.tensor(tree.depths, device=lm.device)

    def fn(state: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        return (lean.logits(lean(tokens, depths, 0, Sight(seen), state[:1], state[1:], cache)),)

    program = Program(fn, [torch.tensor([base, offset], device=lm.device), tree.tokens.to(lm.device)], "cudagraph")
    for shift in range(3):
        tokens = tree.tokens + shift
        (ours,) = program((base, offset), tokens.to(lm.device))
        ours = ours.double()
        cache.length = base
        right = Engine().run([tree_pass(lm, DraftTree(tokens, tree.parents), cache)])[0].logits().double()
        found.append(float((ours - right).norm() / right.norm()))
    return found


def run(what: str, folder: Path) -> int:
    """Run decode, decode every, signals, kernels, kill, kill draft, raise or "apart HOW" as one of the ranks."""
    torch.set_num_threads(1)
    if what.startswith("apart"):
        return guarded(lambda: apart("llava_onevision", what.split()[1], folder), full=False)
    with joined(device()) as ranks:
        if what == "kill draft":
            draft_until_killed(ranks, folder / "killed")
        if what in ("kill", "raise"):
            decode_for_ever(ranks, what, folder / "killed")
        if what == "signals":
            save_file(signals(FAMILIES[0], ranks) | signals(FAMILIES[1], ranks), folder / f"{ranks.rank}.safetensors")
            return 0
        if what == "kernels":
            found = {"errors": kernel_errors(ranks)}
        else:
            every = what == "decode every" or device().type == "cuda"
            found = {family: answers(family, ranks, every) for family in FAMILIES} | {"quantised": quantised(ranks)}
        (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], Path(sys.argv[2])))
