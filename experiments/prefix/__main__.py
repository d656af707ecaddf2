"""Measure what is kept of prompts, with random weights of published shapes and given acceptance, on one GPU.

Parts: the first and the second question about a video; three questions a video with and without reuse; the longest wait
of a request that decodes while another one is prefilled. Clocks start with the request: the pixels are in host memory.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from experiments.batch.drafter import ChanceDrafter
from experiments.gpu_pair.__main__ import commit_of
from experiments.gpu_pair.measure import synchronize
from experiments.gpu_pair.models import wrap_of
from experiments.gpu_pair.shapes import Pair, build, pair_of, prompt_of
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.scheduler import Scheduler, alone
from specvlm.engine import Engine, engine_for
from specvlm.models import memory_plan
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.results import metrics
from specvlm.strategies import Pruner, registry
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt

OUT = Path(__file__).with_name("results.jsonl")
GIB = 2**30


@dataclass
class Bench:
    """One pair and one engine.

    Attributes:
        target: Target model.
        draft: Draft model.
        engine: Engine that runs the passes.
        pair: Their shapes.
        tokens: Video tokens of a prompt.
        ratio: Share of the video tokens to drop.
        tree: Shape of the draft's trees.
        chance: Chance that a guess is right.
        budget: Bytes that are kept of prompts.
        caches: Caches, kept between measurements.
    """

    target: VideoLM
    draft: VideoLM
    engine: Engine
    pair: Pair
    tokens: int
    ratio: float
    tree: str
    chance: float
    budget: int
    caches: CachePool = field(default_factory=CachePool)

    def prompts(self, seed: int, count: int) -> list[VideoPrompt]:
        """Make questions about one video, of equal length, which begin with unlike words."""
        first = prompt_of(self.target, self.pair.target, self.tokens, True, seed)
        found = [first]
        for number in range(1, count):
            tokens = first.tokens.clone()
            tokens[first.cut : first.cut + 9] = (tokens[first.cut : first.cut + 9] + number) % 90 + 5
            found.append(replace(first, tokens=tokens))
        return found

    def graph(self, pruner: Pruner, limit: int, known: Sequence[int], store: PrefixStore | None) -> DecodingGraph:
        """Make a graph whose guesses are right by chance."""
        drafter = ChanceDrafter(TreeDrafter(self.tree), tuple(known), accepted=0.0, chance=self.chance)
        options = GenerationOptions(max_new_tokens=limit, ratio=self.ratio)
        graph = DecodingGraph(
            self.target, self.draft, pruner, drafter, GreedyVerifier(), options, caches=self.caches, engine=self.engine
        )
        graph.prefixes = store
        return graph

    def known(self, prompt: VideoPrompt, limit: int) -> list[int]:
        """Decode a prompt by the target alone."""
        work = autoregressive_work(self.target, prompt, limit, GreedyVerifier(), self.caches, self.engine)
        return metrics.tokens_of(list(alone(self.engine, work)))

    def questions(self, pruner: Pruner, repeats: int) -> dict[str, Any]:
        """Time the first token and the first drafted round of the first and the second question about a video."""
        times = dict[str, list[float]]()
        same = True
        for number in range(repeats + 1):
            store = PrefixStore(self.budget)
            prompts = self.prompts(number, 3)  # the second one captures what only a later question needs
            for which, prompt in zip(("first", "warm", "second"), prompts, strict=True):
                answer = self.known(prompt, 8)
                steps = self.graph(pruner, 8, answer, store).decode(prompt)
                synchronize(self.target.device)
                start, found = perf_counter(), []
                for part in ("first_token", "first_round"):
                    found += next(steps).tokens
                    synchronize(self.target.device)
                    times.setdefault(f"{which}_question_{part}_ms", []).append(1000 * (perf_counter() - start))
                found += metrics.tokens_of(list(steps))
                same &= found == answer
            store.empty()
        return {name: median(values[1:]) for name, values in times.items()} | {"same_tokens": same}

    def answers(self, pruner: Pruner, limit: int, repeats: int) -> dict[str, Any]:
        """Time three questions about a video from end to end, with and without reuse."""
        totals, same = dict[bool, list[float]](), True
        for number in range(repeats + 1):
            prompts = self.prompts(100 + number, 3)
            known = [self.known(prompt, limit) for prompt in prompts]
            for reuse in (False, True):
                store = PrefixStore(self.budget) if reuse else None
                synchronize(self.target.device)
                start = perf_counter()
                for prompt, answer in zip(prompts, known, strict=True):
                    same &= metrics.tokens_of(list(self.graph(pruner, limit, answer, store).decode(prompt))) == answer
                synchronize(self.target.device)
                totals.setdefault(reuse, []).append(perf_counter() - start)
        with_s, without_s = (median(totals[reuse][1:]) for reuse in (True, False))
        return {"with_reuse_s": with_s, "without_s": without_s, "times_faster": without_s / with_s, "same_tokens": same}

    def stall(self, pruner: Pruner, stall_s: float, rounds: int) -> dict[str, Any]:
        """Time the steps of a request while another one is prefilled. The first pass over all captures graphs."""
        found = dict[str, Any]()
        for seed in (200, 300):
            running, late = self.prompts(seed, 1)[0], self.prompts(seed + 1, 1)[0]
            answer = self.known(running, (TreeDrafter(self.tree).fixed.depth + 1) * (400 + rounds))
            found = self._stalled(pruner, stall_s, rounds, running, late, answer)
        return found

    def _stalled(
        self, pruner: Pruner, stall_s: float, rounds: int, running: VideoPrompt, late: VideoPrompt, answer: Sequence[int]
    ) -> dict[str, Any]:
        scheduler = Scheduler(self.engine, stall_s=stall_s)
        first = scheduler.submit(self.graph(pruner, len(answer), answer, None).work(running))
        gaps: dict[str, list[float]] = {"before": [], "during": [], "after": []}
        last, begun, second, token_s, part = 0.0, 0.0, None, None, "before"
        with torch.inference_mode():
            while not first.done and (token_s is None or len(gaps["after"]) < rounds):
                scheduler.turn()
                synchronize(self.target.device)
                now = perf_counter()
                if first.steps:
                    if last:
                        gaps[part].append(now - last)
                    first.steps.clear()
                    last = now
                    part = "after" if token_s is not None else part  # the step that a prefill held up counts as during it
                if second is not None and second.steps and token_s is None:
                    token_s = now - begun
                if second is None and len(gaps["before"]) >= rounds:
                    part = "during"
                    second, begun = scheduler.submit(self.graph(pruner, 8, (), None).work(late)), perf_counter()
            for ticket in (second, first):
                if ticket is not None:
                    scheduler.cancel(ticket)
        return {
            "stall_s": stall_s,
            "round_ms": 1000 * median(gaps["before"]),
            "worst_ms": 1000 * max(gaps["during"]),
            "steps_during": len(gaps["during"]),
            "late_first_token_ms": None if token_s is None else 1000 * token_s,
        }


def line_of(row: dict[str, Any]) -> str:
    """Write a row's figures in a line."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())


def rows_of(bench: Bench, args: argparse.Namespace) -> Any:
    """Measure the parts that were asked for."""
    for name in args.pruners.split(","):
        pruner = registry.build("pruner", name)
        if "question" in args.parts:
            yield {"part": "question", "pruner": name, **bench.questions(pruner, args.repeats)}
        for limit in map(int, args.answers.split(",")) if "answers" in args.parts else ():
            yield {"part": "answers", "pruner": name, "new_tokens": limit, **bench.answers(pruner, limit, args.repeats)}
        for stall in map(float, args.stalls.split(",")) if "stall" in args.parts else ():
            yield {"part": "stall", "pruner": name, **bench.stall(pruner, stall, args.rounds)}


def main(words: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.prefix", description=__doc__)
    parser.add_argument("--shape", default="qwen2_5_vl_32b_7b", help="pair of experiments.gpu_pair (default: %(default)s)")
    parser.add_argument("--video-tokens", type=int, default=16384, help="video tokens of a prompt (default: %(default)s)")
    parser.add_argument("--parts", default="question,answers,stall", help="what to measure (default: %(default)s)")
    parser.add_argument("--pruners", default="two_stage,uniform", help="pruners, with commas (default: %(default)s)")
    parser.add_argument("--answers", default="32,128", help="lengths of answers, with commas (default: %(default)s)")
    parser.add_argument("--stalls", default="0.06,0.03,1000", help="bounds of a stall in seconds (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.9, help="share of the video tokens to drop (default: %(default)s)")
    parser.add_argument("--tree", default="paper", help="shape of the draft's trees (default: %(default)s)")
    parser.add_argument("--chance", type=float, default=0.8, help="chance that a guess is right (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="measurements, of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds before and after a stall (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=12, help="GiB that are kept of prompts (default: %(default)s)")
    parser.add_argument("--commit", default="", help="if git is not available")
    parser.add_argument("--out", type=Path, default=OUT, help="file to append a line of JSON per row to")
    args = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pair = pair_of(args.shape)
    assert pair.draft is not None
    with torch.inference_mode():
        models = [build(shape, wrap_of(shape.family), device, dtype) for shape in (pair.target, pair.draft)]
    engine = engine_for("auto", device)
    tokens, budget = args.video_tokens, int(args.budget * GIB)
    bench = Bench(*models, engine, pair, tokens, args.ratio, args.tree, args.chance, budget)
    about = {
        "shape": args.shape,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or commit_of(),
        "versions": {k: v for k, v in metrics.versions().items() if k in ("python", "torch", "transformers")},
        "weights": "random weights of the true shapes",
        "acceptance": f"given: each guess right with probability {args.chance}",
        "video_tokens": tokens,
        "ratio": args.ratio,
        "tree": args.tree,
    }
    for row in rows_of(bench, args):
        print(line_of(row), flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(about | {"peak_gib": memory_plan.peak_bytes(device) / GIB} | row) + "\n")
        gc.collect()
    synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
