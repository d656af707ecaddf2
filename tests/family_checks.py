"""Load the folders of `family_folders`, and get the answers of pristine models to their requests."""

from __future__ import annotations

import atexit
import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from itertools import cycle, groupby, product
from pathlib import Path
from tempfile import TemporaryDirectory

import family_folders
import packages
import pytest
import torch
from pristine_worker import LIMIT
from towers import remember_features, remember_passes
from transformers import AutoModelForImageTextToText

from specvlm import custom_generate, load_pair
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Drafter, Pruner, registry
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt
from specvlm.video.video import Clip

HERE = Path(__file__).parent
SCRATCH: list[TemporaryDirectory] = []  # removed when the process ends


def requests(family: str) -> tuple[str, ...]:
    return (*family_folders.requests(family), *family_folders.CHATS)


def scratch() -> Path:
    SCRATCH.append(TemporaryDirectory(prefix="specvlm_"))
    return Path(SCRATCH[-1].name)


@cache
def folder(family: str) -> Path:
    if family in family_folders.FAMILIES:
        return family_folders.make(scratch(), family)
    return family_folders.ASSETS.parents[1] / family  # an embedded pair


@cache
def model(family: str, name: str = "target") -> VideoLM:
    return load(folder(family) / name, "float32")


@cache
def quick(family: str, name: str = "target") -> VideoLM:
    """Return the model as one that encodes each video once, and prefills each prompt and pruned view once."""
    return remember_passes(remember_features(copy.copy(model(family, name))), least=9)


def clip(count: int, height: int, width: int, fps: float) -> Clip:
    """Make a clip that was sampled from a file: every fourth of its frames."""
    index = tuple(range(0, 4 * count, 4))
    times = tuple(place / (4 * fps) for place in index)
    return Clip(family_folders.frames(count, height, width), times, fps, "made", 4 * count, 4 * fps, index)


def picture(height: int, width: int) -> torch.Tensor:
    return family_folders.frames(1, height, width)[0]


@cache
def prompt(family: str, request: str) -> VideoPrompt:
    if request in family_folders.CHATS:
        return model(family).chat(family_folders.chat(request, clip, picture))
    videos, images = family_folders.requests(family)[request]
    pictures = [picture(*size) for size in images]
    return model(family).prompt(family_folders.QUESTION, [clip(*video) for video in videos], pictures)


@cache
def pristine_process() -> subprocess.Popen[str]:
    """Start the process without specvlm that answers for every family, since it takes seconds to import Hugging Face's."""
    command, env = [sys.executable, str(HERE / "pristine_worker.py")], {**os.environ, "PYTHONPATH": ""}
    made = subprocess.Popen(command, env=env, cwd=scratch(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(made.communicate)  # closes its input, and waits
    return made


@cache
def answers(family: str, name: str = "target") -> dict[str, list[int]]:
    """Answers of Hugging Face's own model under sdpa to every request, from a process without specvlm."""
    made = {request: model(family).generate_inputs(prompt(family, request)) for request in requests(family)}
    place, worker = scratch(), pristine_process()
    torch.save(made, place / "requests.pt")
    paths = (folder(family) / name, place / "requests.pt", place / "answers.json")
    print(json.dumps([str(path) for path in paths]), file=worker.stdin, flush=True)
    assert worker.stdout.readline() == "answered\n", "the process without specvlm failed"
    return json.loads((place / "answers.json").read_text())


def graph_of(family: str, draft: str, pruner: object, drafter: object, **options: object) -> DecodingGraph:
    target, its = quick(family), quick(family, draft)
    return DecodingGraph(target, its, pruner, drafter, GreedyVerifier(), GenerationOptions(LIMIT, **options))


def decode(family: str, request: str, draft: str, pruner: object, drafter: object, **options: object) -> list[int]:
    return tokens_of(list(graph_of(family, draft, pruner, drafter, **options).decode(prompt(family, request))))


CHAINS = (TreeDrafter("chain:3"), SelfDrafter("chain:3"))
EVERY = [pytest.param(False, id="sample"), pytest.param(True, id="every", marks=pytest.mark.exhaustive)]  # for `every` below


def unequal_requests(family: str, draft: str = "draft", some: Sequence[str] = (), every: bool = True) -> tuple[int, list[str]]:
    """Decode some requests, or all, alone and with two drafters. Returns the number of decodes, and those unlike `generate`.

    every: All crossings of requests, drafters and ratios. Else each request with one drafter and ratio in turn;
    `check_family`, which has seven kinds of requests, crosses them.
    """
    wrong, chosen = [], some or requests(family)
    for request in chosen:
        alone = tokens_of(list(autoregressive(model(family), prompt(family, request), LIMIT, GreedyVerifier())))
        wrong += [] if alone == answers(family)[request] else [f"{request}: alone"]
    turned = zip(chosen, cycle(CHAINS), cycle((0.9, 0.0, 1.0)), strict=False)
    cells = product(chosen, CHAINS, (0.0, 0.9, 1.0)) if every else turned
    tried = len(chosen)
    for request, drafter, ratio in cells:
        tokens = decode(family, request, draft, TwoStagePruner(), drafter, ratio=ratio)
        wrong += [] if tokens == answers(family)[request] else [f"{request}: {drafter!r}, ratio {ratio}"]
        tried += 1
    return tried, wrong


def unequal_strategies(family: str, request: str = "video", every: bool = True) -> tuple[int, list[str]]:
    """Decode with pruners, built in or under plugins/, and with every drafter. Returns as `unequal_requests`.

    every: Each pruner with both drafts, and all crossings of drafters, ratios and positions. Else a third of the pruners,
    each with one draft, and each drafter with one ratio and position; the next family has the next of all of them.
    """
    answer, wrong, tried = answers(family)[request], [], 0
    turn, drafts = list(family_folders.FAMILIES).index(family), ("draft", "small")
    pruners, drafters = all_pruners(), all_drafters()
    pruned = list(product(drafts, pruners)) if every else list(zip(cycle(drafts), pruners[turn % 3 :: 3], strict=False))
    for draft, pruner in pruned:
        tokens = decode(family, request, draft, pruner, CHAINS[0], ratio=0.7)
        wrong += [] if tokens == answer else [f"{draft}: {pruner!r}"]
        tried += 1
    ways = list(product(RATIOS, POSITIONS))
    turned = ((drafter, *ways[(turn + number) % len(ways)]) for number, drafter in enumerate(drafters))
    for drafter, ratio, positions in product(drafters, RATIOS, POSITIONS) if every else turned:
        tokens = decode(family, request, "small", UniformPruner(), drafter, ratio=ratio, positions=positions)
        wrong += [] if tokens == answer else [f"{drafter!r}, ratio {ratio}, {positions}"]
        tried += 1
    return tried, wrong


def captured_answers(family: str, request: str = "video") -> list[list[int]]:
    """Decode in float64 on the CPU: drafted and alone by the captured engine's own passes, and alone by Hugging Face's."""
    target, small = (
        type(lm)(copy.deepcopy(lm.hf).double(), lm.tokenizer, lm.folder) for lm in (model(family), model(family, "small"))
    )
    engine, greedy, asked = GraphsEngine("direct"), GreedyVerifier(), prompt(family, request)
    graph = DecodingGraph(target, small, TwoStagePruner(), TreeDrafter(), greedy, GenerationOptions(LIMIT, 0.5), engine=engine)
    found = [list(graph.decode(asked)), list(autoregressive(target, asked, LIMIT, greedy, engine=engine))]
    assert engine.runs(target) == engine.runs(small) == engine.name
    return [tokens_of(steps) for steps in (*found, list(autoregressive(target, asked, LIMIT, greedy)))]


RATIOS, POSITIONS = (0.0, 0.5, 0.9), ("original", "reindexed")


def all_pruners() -> list[Pruner]:
    return [*(registry.build("pruner", name) for name in registry.collect()["pruner"]), *packages.strategies(Pruner)]


def all_drafters() -> list[Drafter]:
    return [registry.build("drafter", name) for name in registry.collect()["drafter"]]


def unlike_the_processor(family: str) -> tuple[int, list[str]]:
    """Compare every prompt with what Hugging Face's processor made of it (frozen by data/make_families.py).

    Compares token ids, grids, and pixels of videos. Pixels of images are those of Hugging Face's PIL processor, which
    differ from torchvision's. Returns the number of comparisons, and those that are unlike.
    """
    frozen, wrong, tried = json.loads((HERE / "data" / "families.json").read_text())[family], [], 0
    for request, case in frozen.items():
        made = model(family).generate_inputs(prompt(family, request))
        ours = {"ids": [[token, len(list(same))] for token, same in groupby(made["input_ids"][0].tolist())]}
        ours |= {name: made[name].tolist() for name in ("video_grid_thw", "image_grid_thw") if name in made}
        if "pixels" in case:
            pixels = made.get("pixel_values_videos", made.get("pixel_values"))
            ours["pixels"] = sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]
        wrong += [f"{request}: {name}" for name in case if ours.get(name) != case[name]]
        tried += len(case)
    return tried, wrong


def unlike_from_inputs(family: str) -> tuple[int, list[str]]:
    """Make every prompt again of the inputs that Hugging Face's processor makes. Returns their number, and those unlike."""
    lm, wrong, asked = model(family), [], [*requests(family)]
    for request in asked:
        want = prompt(family, request)
        found = lm.hf_prompt(lm.hf_inputs(lm.hf.config, want))
        same = [torch.equal(getattr(found, name), getattr(want, name)) for name in ("tokens", "video_index", "image_index")]
        same += [found.grids == want.grids, torch.equal(lm.positions(found), lm.positions(want))]
        same += [len(found.videos) == len(want.videos)]
        for ours, theirs in zip(found.items, want.items, strict=False):
            same += [torch.equal(ours[name], value) for name, value in theirs.items() if isinstance(value, torch.Tensor)]
        wrong += [] if all(same) else [request]
    return len(asked), wrong


def session_answers(family: str) -> list[list[int]]:
    """Ask a session messages, a processor's inputs and, by `custom_generate`, Hugging Face's model. All answers are one."""
    of = load_pair(folder(family) / "target", folder(family) / "small", device="cpu", dtype="float32", max_new_tokens=LIMIT)
    messages = family_folders.chat("interleaved", clip, picture)
    inputs = of.target.generate_inputs(prompt(family, "interleaved"))
    hf = AutoModelForImageTextToText.from_pretrained(folder(family) / "target", dtype=torch.float32).eval()
    theirs = hf.generate(**inputs, max_new_tokens=LIMIT, custom_generate=custom_generate(folder(family) / "small"))
    found = [of.generate(messages, check=True), of.generate(inputs, check=True)]
    assert [one.verdict for one in found] == ["identical"] * 2
    return [*(one.token_ids for one in found), theirs[0, inputs["input_ids"].shape[1] :].tolist()]
