"""Eight threads, a request each, one pool of caches, one engine: every answer is the one that the request has alone."""

from __future__ import annotations

import random
import threading
from functools import cache

import tiny

from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.kv_cache import CachePool
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions

COUNT, SAMPLE = 50, 2
THREADS = 8
DRAFTERS = (
    TreeDrafter(),
    TreeDrafter("chain:3"),
    DynamicTreeDrafter(nodes=8, depth=3, width=4),
    EntropyTreeDrafter(),
    TreeDrafter("auto"),
    SelfDrafter("chain:3"),
    SparseDrafter(entries=64, length=3),
    PromptLookupDrafter(),
)
Case = tuple[str, int, int, int, int, float]  # family, drafter, seed, frames, limit, temperature


def run(count: int, seed: int) -> list[str]:
    chance, found = random.Random(seed), []
    for number in range(count):
        engine, caches = (GraphsEngine("direct") if number % 2 else Engine()), CachePool()
        cases = [drawn(chance) for _ in range(THREADS)]
        wanted = [alone(case) for case in cases]  # first: making the tiny models draws of torch's global generator
        for case, answer, want in zip(cases, at_once(cases, engine, caches), wanted, strict=True):
            if answer != want:
                found.append(f"round {number}, {engine.name}: {case} gives {answer}, alone {want}")
        if caches._leased:
            found.append(f"round {number}, {engine.name}: {len(caches._leased)} caches were not given back")
    return found


def drawn(chance: random.Random) -> Case:
    family, drafter = chance.choice(tiny.FAMILIES), chance.randrange(len(DRAFTERS))
    return family, drafter, chance.randrange(6), chance.choice((2, 3, 5)), chance.randint(3, 10), chance.choice((0, 0, 0.8))


def graph_of(case: Case, engine: Engine, caches: CachePool) -> DecodingGraph:
    family, drafter, seed, _, _, temperature = case
    rule = SamplingVerifier(temperature) if temperature else GreedyVerifier()
    pair, options = (tiny.model(family), tiny.draft_of(family)), GenerationOptions(ratio=0.5, seed=seed)
    return DecodingGraph(*pair, UniformPruner(), DRAFTERS[drafter], rule, options, caches=caches, engine=engine)


def answered(case: Case, engine: Engine, caches: CachePool) -> list[int] | str:
    family, _, seed, frames, limit, _ = case
    try:
        return tokens_of(list(graph_of(case, engine, caches).decode(tiny.prompt(family, seed, frames=frames), limit)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@cache
def alone(case: Case) -> list[int] | str:
    return answered(case, Engine(), CachePool())


def at_once(cases: list[Case], engine: Engine, caches: CachePool) -> list[list[int] | str]:
    answers: list[list[int] | str] = ["nothing"] * len(cases)

    def serve(number: int) -> None:
        answers[number] = answered(cases[number], engine, caches)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
