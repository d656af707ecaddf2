"""Random crossings of all that a request can ask for: each answer is that of a pristine Hugging Face model, token by token.

Family, pruner, drafter, ratio, penalty, stop ids, limit, videos and images, positions, mrope, draft and engine are drawn; the
models are tiny ones in float64, so that a difference is a fault and never a rounding. A finding names its seed and its case:
`PYTHONPATH=.:tests python -c "from campaign.crossings import *; print(fault_of(drawn(SEED, CASE)))"` runs it again.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import packages
import reference
import tiny
import torch

from campaign import fork  # noqa: F401  (its environment: no hub, no plugins of the developer's)
from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import acceptance_of, tokens_of
from specvlm.strategies import Drafter, Pruner, Strategy
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter, candidates
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.fastv import FastVPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.window import WindowPruner
from specvlm.strategies.registry import collect
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt

COUNT, SAMPLE = 500, 40

LONGEST = 24  # tokens of an answer
SHAPES = ("paper", "chain:1", "chain:5", "3x2", "2x2x1", "8", "[[0],[1],[2],[0,0],[2,0]]")
OF_A_DRAFT = (*("itself", "itself", "noise 0.02") * 2, "noise 0.2", "vocabulary 94", "vocabulary 128")


@dataclass(frozen=True)
class Case:
    """A request and how it is decoded. layout: `v` a video, `i` an image, in order; video: frames, height and width in patches
    (Qwen's alone) and seconds of one temporal patch; stops: indices into the answer without them, and other ids behind `ids`.
    """

    seed: int
    case: int
    family: str
    layout: str
    videos: tuple[tuple[int, int, int, float], ...]
    words: int
    tail: int
    pruner: Pruner
    drafter: Drafter
    ratio: float
    positions: str
    mrope: str
    penalty: float
    limit: int
    stops: tuple[int, ...]
    ids: tuple[int, ...]
    weights: int
    draft: str
    engine: str

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def run(count: int, seed: int) -> list[str]:
    found, guessed, stopped = [], 0, 0
    for case in (drawn(seed, number) for number in range(count)):
        fault, accepted, ended = outcome_of(case)
        found += [f"{case}: {fault}"] * bool(fault)
        guessed, stopped = guessed + (accepted >= 1), stopped + ended
    said = f"{guessed} with a guess or more accepted a round, {stopped} ended by a stop id"
    print(f"crossings: of {count} answers {said}", file=sys.stderr)
    return found


def fault_of(case: Case) -> str:
    return outcome_of(case)[0]


def drawn(seed: int, number: int) -> Case:
    """The same for the same seed and number, whatever was drawn before."""
    chance = random.Random(f"{seed} {number}")
    family = chance.choice(tiny.FAMILIES)
    layout = ["v"] * chance.randint(1, 3) + ["i"] * chance.choice((0, 0, 1, 2, 3))
    chance.shuffle(layout)
    videos = [drawn_video(chance) for _ in range(layout.count("v"))]
    if family == "llava_onevision":  # Hugging Face stacks its videos: they are of one length
        videos = [videos[0]] * len(videos)
    return Case(
        seed=seed,
        case=number,
        family=family,
        layout="".join(layout),
        videos=tuple(videos),
        words=chance.choice((3, 8, 75)),
        tail=chance.randint(1, 9),
        pruner=chance.choice(pruners()),
        drafter=drawn_drafter(chance),
        ratio=chance.choice((0.0, 0.05, 0.2, 0.5, 0.9, 1.0, round(chance.random(), 3))),
        positions=chance.choice(("original", "reindexed")),
        mrope=chance.choice(("hf", "reference")),
        penalty=chance.choice((*[1.0] * 3, 1.05, 1.3, 0.8)),
        limit=chance.choice((1, 2, *(chance.randint(3, LONGEST) for _ in range(6)), LONGEST)),
        stops=tuple(chance.sample(range(LONGEST), chance.choice((0, 0, 1, 3)))),
        ids=tuple(chance.sample(range(97), chance.choice((0, 1, 3)))),
        weights=chance.randrange(3),
        draft=chance.choice(OF_A_DRAFT),
        engine=chance.choice(("eager", "eager", "direct")),
    )


def drawn_video(chance: random.Random) -> tuple[int, int, int, float]:
    return chance.randint(1, 9), chance.choice((4, 6, 8)), chance.choice((4, 6, 10)), chance.choice((0.5, 1.0, 2.3))


@cache
def pruners() -> list[Pruner]:
    """One of every class with its defaults, and of some built-in ones others."""
    more = [WindowPruner("front"), WindowPruner("back"), TwoStagePruner(spread="frame"), TwoStagePruner(mass=0.9)]
    more += [FastVPruner(layer=1), FastVPruner(layer=3, source="draft")]
    return [*built_in("pruner"), *more, *packages.strategies(Pruner)]  # type: ignore[list-item]


def drawn_drafter(chance: random.Random) -> Drafter:
    depth, width = chance.randint(1, 6), chance.randint(1, 6)
    nodes = chance.randint(1, min(30, candidates(depth, width)))
    longest = chance.randint(1, 4)
    drafters = [
        TreeDrafter(chance.choice(SHAPES)),
        DynamicTreeDrafter(nodes, depth, width),
        EntropyTreeDrafter(chance.randint(1, 63), chance.randint(3, 8), shallow=chance.randint(1, 3)),
        SelfDrafter(chance.choice(SHAPES)),
        SparseDrafter(chance.randint(1, 120), chance.randint(1, 9)),
        PromptLookupDrafter(longest, chance.randint(1, longest), chance.randint(1, 9)),
    ]
    return chance.choice([*drafters, *other_drafters(frozenset(map(type, drafters)))])


@cache
def other_drafters(but: frozenset[type[Drafter]]) -> list[Drafter]:
    """Those of the packages, and built-in ones of other classes: the ones to come."""
    return [one for one in (*built_in("drafter"), *packages.strategies(Drafter)) if type(one) not in but]  # type: ignore[misc]


def built_in(kind: str) -> list[Strategy]:
    return [info.cls() for info in collect()[kind].values() if info.plugin == "specvlm"]


# ---- the two answers --------------------------------------------------------------------------------------------------


def outcome_of(case: Case) -> tuple[str, float, bool]:
    """What is wrong with the answer, guesses accepted a round, and whether a stop id ended it."""
    prompt = prompt_of(case)
    alone = answer_alone(case, prompt)
    stop_ids = frozenset(case.ids) | {alone[index] for index in case.stops}
    expected = reference.ended(alone, case.limit, stop_ids)
    target, draft = fresh(tiny.model(case.family, case.weights), case), fresh(draft_of(case), case)
    engine = Engine() if case.engine == "eager" else GraphsEngine("direct")
    graph = DecodingGraph(target, draft, case.pruner, case.drafter, GreedyVerifier(), engine=engine)
    asked = GenerationOptions(case.limit, case.ratio, case.positions, repetition_penalty=case.penalty, stop_ids=stop_ids)
    try:
        steps = list(graph.decode(prompt, asked))
    except Exception as error:
        return f"{type(error).__name__}: {error}", 0.0, False
    accepted = acceptance_of(steps)["accepted_per_round"] or 0.0
    return difference(tokens_of(steps), expected), accepted, expected[-1] in stop_ids


def difference(tokens: Sequence[int], expected: Sequence[int]) -> str:
    if list(tokens) == list(expected):
        return ""
    same = [a == b for a, b in zip(tokens, expected, strict=False)]
    at = same.index(False) if False in same else len(same)
    return f"from token {at} on {list(tokens[at:])}, the reference has {list(expected[at:])}"


def answer_alone(case: Case, prompt: VideoPrompt) -> list[int]:
    """The reference's LONGEST tokens, without stop ids."""
    hf = pristine_of(case.family, case.weights)
    if case.family == "llava_onevision" or case.mrope == "hf":
        return reference.generated(hf, prompt, LONGEST, repetition_penalty=case.penalty)
    return reference.decoded(hf, prompt, LONGEST, reference.trained_positions(hf, prompt), case.penalty)


@cache
def pristine_of(family: str, weights: int) -> Any:
    return reference.pristine(tiny.model(family, weights).hf)


def fresh(lm: VideoLM, case: Case) -> VideoLM:
    """The same model with this case's own settings."""
    made = tiny.wrap(lm.hf)
    made.mrope = case.mrope
    return made


@cache
def noisy(family: str, weights: int, noise: float) -> VideoLM:
    hf, generator = copy.deepcopy(tiny.model(family, weights).hf), torch.Generator().manual_seed(weights)
    for weight in hf.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return tiny.wrap(hf)


def draft_of(case: Case) -> VideoLM:
    kind, _, number = case.draft.partition(" ")
    if kind == "itself":
        return tiny.model(case.family, case.weights)
    if kind == "noise":
        return noisy(case.family, case.weights, float(number))
    return tiny.model(case.family, seed=7, vocabulary=int(number))


def prompt_of(case: Case) -> VideoPrompt:
    """Words, and videos and images among them; fewer different words repeat themselves more."""
    chance = random.Random(f"{case.seed} {case.case} words")

    def words(count: int) -> list[int]:
        return [5 + chance.randrange(case.words) for _ in range(count)]

    ids = words(chance.randint(0, 4))
    for kind in case.layout:
        ids += [tiny.START, tiny.VIDEO if kind == "v" else tiny.IMAGE, tiny.END, *words(chance.randint(0, 3))]
    ids += words(case.tail)
    pairs = [tiny.video(case.family, f, chance.randrange(99), h, w) for f, h, w, _ in case.videos]
    for (_, video), (*_, seconds) in zip(pairs, case.videos, strict=True):
        if "seconds" in video:
            video["seconds"] = seconds
    images = case.layout.count("i")
    pictures = [tiny.image(case.family, chance.randrange(99), alone=images == 1) for _ in range(images)]
    return tiny.model(case.family).expand(ids, [grid for grid, _ in pairs], [video for _, video in pairs], pictures)
