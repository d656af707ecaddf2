"""Answers of lossy rules on the embedded pairs: none ends on a stop id that the target did not choose, none goes past one.

Family, scene, question, drafter, draft, ratio, engine and rule are drawn. The target reads each answer again, in one causal
pass; where it would stop is compared with where the answer does. A finding names its seed and its case.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from campaign import fork  # noqa: F401  (its environment: no hub, no plugins of the developer's)
from specvlm.config import model_folder
from specvlm.decoding.evidence import DRIFT, GAP
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Drafter, Verifier, VerifyContext
from specvlm.strategies.datasets.synthetic import FIRST, clip
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.types import GenerationOptions, VideoPrompt
from specvlm.video import synthetic

COUNT, SAMPLE = 200, 4

FAMILIES = ("qwen2_5_vl", "llava_onevision")
FRAMES, LIMIT = 8, 60
DRAFTERS: tuple[Drafter, ...] = (
    *(TreeDrafter("chain:10"), TreeDrafter("chain:3"), TreeDrafter(), DynamicTreeDrafter(), EntropyTreeDrafter()),
    *(SelfDrafter("chain:5"), PromptLookupDrafter()),
)


@dataclass(frozen=True)
class Credulous(Verifier):
    """Takes every first guess, and goes on with the target's second choice: a rule of somebody else's, as bad as can be."""

    name = "credulous"
    lossless = False

    def decide(self, ctx: VerifyContext) -> torch.Tensor:
        last = 0
        while last in ctx.tree.parents:
            last = ctx.tree.parents.index(last)
        second = ctx.logits_MV.topk(2).indices[last, 1]
        return torch.stack([torch.full_like(second, last), second])


RULES = (LooseVerifier(), LooseVerifier(1.0), LooseVerifier(0.3, window=5), LooseVerifier(0.0), Credulous())


def run(count: int, seed: int) -> list[str]:
    found, ended, lossy = [], 0, 0
    for number in range(count):
        case = drawn(seed, number)
        tokens, faults = outcome_of(**case)
        found += [f"seed {seed}, case {number} ({said(case)}): {fault}" for fault in faults]
        ended += tokens[-1] in model(case["family"], "target").stop_ids
        lossy += tokens != own_answer(case["family"], case["scene"], case["question"])
    print(f"lossy_stops: of {count} answers {ended} end on a stop id, {lossy} are not the target's own", file=sys.stderr)
    return found


def drawn(seed: int, number: int) -> dict[str, Any]:
    """The same for the same seed and number, whatever was drawn before."""
    chance = random.Random(f"{seed} {number}")
    scene = chance.randrange(40)
    asked = [question for question, _ in synthetic.questions(synthetic.sample_scene(FIRST + scene, min_objects=2), scene)]
    return {
        "family": chance.choice(FAMILIES),
        "scene": scene,
        "question": chance.choice([*asked, chance.choice(synthetic.CAPTION_QUESTIONS)]),
        "drafter": chance.choice(DRAFTERS),
        "draft": chance.choice(("plain", "aware")),
        "ratio": chance.choice((0.5, 0.9, 1.0)),
        "graphs": chance.random() < 0.3,
        "rule": chance.choice(RULES),
        "seed": chance.randrange(1000),
    }


def said(case: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items())


def outcome_of(
    family: str, scene: int, question: str, drafter: Drafter, draft: str, ratio: float, graphs: bool, rule: Verifier, seed: int
) -> tuple[list[int], list[str]]:
    """An answer, and what is wrong with its end."""
    target, prompt = model(family, "target"), prompt_of(family, scene, question)
    engine = GraphsEngine("direct") if graphs else Engine()
    pair = (target, model(family, draft), UniformPruner(), drafter, rule)
    tokens = tokens_of(list(DecodingGraph(*pair, GenerationOptions(LIMIT, ratio, seed=seed), engine=engine).decode(prompt)))
    return tokens, faults_of(target, prompt, tokens)


@torch.inference_mode()
def faults_of(target: VideoLM, prompt: VideoPrompt, tokens: list[int]) -> list[str]:
    """Where one of an answer's token and the target's choice there is a stop id, and the other is another token."""
    cache = target.new_cache(len(prompt) + len(tokens))
    features = target.features(prompt)
    hidden_D = target.prefill(target.embed(prompt, features), target.positions(prompt), cache, prompt.cut)
    logits_TV = target.head(hidden_D[None])
    if len(tokens) > 1:
        logits_TV = torch.cat([logits_TV, Engine().append(target, torch.tensor(tokens[:-1]), cache)])
    faults, stops = [], target.stop_ids
    for at, (token, logits_V) in enumerate(zip(tokens, logits_TV, strict=True)):
        own = int(logits_V.argmax())
        tie = GAP * DRIFT[logits_V.dtype] * float(logits_V.abs().max())
        if own != token and {own, token} & stops and float(logits_V[own] - logits_V[token]) > tie:
            ends = "ends" if token in stops else "goes on"
            faults.append(f"token {at} of {len(tokens)} {ends} with {token}, the target has {own}")
    return faults


@cache
def model(family: str, name: str) -> VideoLM:
    return load(model_folder(f"embedded:{family}/{name}"), "float32")


@cache
def prompt_of(family: str, scene: int, question: str) -> VideoPrompt:
    whole = clip(scene)
    places = torch.arange(FRAMES) * len(whole.frames) // FRAMES
    frames = type(whole)(
        whole.frames[places], tuple(whole.times[at] for at in places.tolist()), FRAMES / len(whole.frames) * whole.fps,
        whole.source, whole.total_frames, whole.source_fps,
    )  # fmt: skip
    return model(family, "target").prompt(question, [frames])


@cache
def own_answer(family: str, scene: int, question: str) -> list[int]:
    target = model(family, "target")
    return tokens_of(list(autoregressive(target, prompt_of(family, scene, question), LIMIT, GreedyVerifier())))
