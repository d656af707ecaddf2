"""Faults of the speculative path on real footage, in bfloat16 and float32: does the comparison tell them from numeric ties?

An attack is a fault, a prompt and a dtype: decoded without the fault and with it, each output compared with the target's own.
Of the outputs that a fault changes at most one in MOST may be called a tie, and none without a fault a mismatch.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from campaign import footage
from campaign.faults import FAULTS, planted
from campaign.knowing import KnowingDrafter, Listening
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.decoding.lossless import Comparison, compare
from specvlm.engine import Engine
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Drafter, Pruner
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, Step, VideoPrompt

PROMPTS, DTYPES, MOST = 40, ("bfloat16", "float32"), 50
COUNT, SAMPLE = 300, 4  # of 3,360, of which 3 of 1,897 changed outputs were called a tie
LIMIT = 48  # tokens of an answer
SHAPES = ("paper", "chain:4", "3x2x1")
GREEDY, POOL = GreedyVerifier(), CachePool()


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt, the target with its penalty and stop ids, and its own answer. choices: its best tokens at every place."""

    target: VideoLM
    prompt: VideoPrompt
    baseline: list[int]
    choices: list[list[int]]
    number: int

    @property
    def drafter(self) -> KnowingDrafter:
        return KnowingDrafter(SHAPES[self.number % len(SHAPES)], self.choices, self.number)

    def decode(self, drafter: Drafter, pruner: Pruner, engine: Engine) -> list[Step]:
        graph = DecodingGraph(
            self.target, None, pruner, drafter, GREEDY, GenerationOptions(ratio=0.5), caches=POOL, engine=engine
        )
        return list(graph.decode(self.prompt, LIMIT))

    def judge(self, steps: Sequence[Step], engine: Engine) -> Comparison:
        return compare(self.target, self.prompt, self.baseline, tokens_of(steps), POOL, engine, steps, GREEDY)


def case_of(number: int, family: str, prompt: VideoPrompt, lm: VideoLM) -> Case:
    """Half of them with a repetition penalty, a quarter with a stop id in the middle of the answer."""
    target, listening = copy.copy(lm), Listening()
    target.repetition_penalty = 1.1 if number % 4 >= 2 else 1.0
    answer = tokens_of(list(autoregressive(target, prompt, LIMIT, listening, POOL)))
    if number % 8 in (2, 5):
        late = (token for at, token in enumerate(answer) if at >= len(answer) // 2 and token not in answer[:at])
        if (stop := next(late, None)) is not None:
            target.stop_ids |= {stop}
            answer = answer[: answer.index(stop) + 1]
    return Case(target, prompt, answer, listening.choices, number)


@cache
def case(number: int, dtype: str) -> Case:
    family, prompt = footage.prompt(number)
    return case_of(number, family, prompt, footage.model(family, "target", dtype))


@cache
def without_a_fault(number: int, dtype: str) -> tuple[list[int], Comparison]:
    return decoded(case(number, dtype))


def decoded(one: Case) -> tuple[list[int], Comparison]:
    """The output, and what is said of it."""
    return judged(one, steps_of(one))


def steps_of(one: Case) -> list[Step]:
    return one.decode(one.drafter, NonePruner(), Engine())


def judged(one: Case, steps: Sequence[Step]) -> tuple[list[int], Comparison]:
    return tokens_of(steps), one.judge(steps, Engine())


def run(count: int, seed: int) -> list[str]:
    every = list(itertools.product(FAULTS, range(PROMPTS), DTYPES))
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    found, said = [], Counter[tuple[str, str]]()
    for name, number, dtype in sorted(chosen, key=lambda attack: attack[1:]):
        right, of_right = without_a_fault(number, dtype)
        if of_right.verdict == "mismatch":
            found.append(f"prompt {number} in {dtype}, without a fault: {of_right}")
        one = case(number, dtype)
        with planted(name):
            try:
                steps = steps_of(one)
            except RuntimeError:  # a cache that overflows: nothing came out
                continue
            wrong, of_wrong = judged(one, steps)
        if of_wrong.verdict == "identical" and wrong != one.baseline:
            found.append(f"{name}, prompt {number} in {dtype}: another output is called identical")
        if wrong != right:
            said[dtype, of_wrong.verdict] += 1
    for dtype in DTYPES:
        ties, changed = said[dtype, "tie"], said[dtype, "tie"] + said[dtype, "mismatch"]
        print(f"planted_faults: {dtype}: {ties} of {changed} outputs that a fault changed are called a tie", flush=True)
        if ties > max(1, changed / MOST):
            found.append(f"{dtype}: {ties} of {changed} outputs that a fault changed are called a tie")
    if not said:
        found.append("no fault changed an output")
    return sorted(set(found))
