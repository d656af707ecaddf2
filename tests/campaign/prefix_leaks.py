"""Many requests under a small budget of kept prompts: memory stays what it is, and nothing stays in use or claimed.

Tiny models. Requests repeat videos and questions, go on with chats, run beside each other, and are given up half-way.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import replace

import psutil
import tiny
import torch

from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine import Engine
from specvlm.models.kv_cache import CachePool
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt

COUNT, SAMPLE = 500, 8
FEW = SAMPLE  # fewer find no beginning of a prompt that is kept
BUDGET = 150_000  # bytes: two or three prompts
GROWTH_MB = 32  # over the second half: what the allocator of the C library keeps or gives back
AT_ONCE = 4


def prompts(chance: random.Random) -> Iterator[VideoPrompt]:
    """Make prompts without end: few videos, few questions, some of them longer chats."""
    while True:
        found = tiny.prompt(chance.choice(tiny.FAMILIES), seed=chance.randrange(4), frames=chance.choice((3, 4)))
        words = [chance.randrange(5, 8) for _ in range(chance.randint(1, 12))]
        yield replace(found, tokens=torch.cat([found.tokens[: found.cut], torch.tensor(words)]))


def family_of(prompt: VideoPrompt) -> str:
    return tiny.FAMILIES[0] if "thw" in prompt.videos[0] else tiny.FAMILIES[1]


def run(count: int, seed: int) -> list[str]:
    chance, engine, caches = random.Random(seed), Engine(), CachePool()
    store, found, sizes = PrefixStore(BUDGET, BUDGET), list[str](), list[int]()
    made = prompts(chance)
    for number in range(0, count, AT_ONCE):
        scheduler = Scheduler(engine, stall_s=chance.choice((0.0, 1.0)))
        pruner = chance.choice((UniformPruner(), TwoStagePruner()))
        asked, works = [next(made) for _ in range(AT_ONCE)], []
        for prompt in asked:
            models = tiny.model(family_of(prompt)), tiny.draft_of(family_of(prompt))
            strategies = (pruner, TreeDrafter("2x1"), GreedyVerifier())
            graph = DecodingGraph(*models, *strategies, GenerationOptions(6, 0.5), caches=caches, engine=engine)
            graph.prefixes = store
            works.append(graph)
        tickets = [scheduler.submit(graph.work(prompt)) for graph, prompt in zip(works, asked, strict=True)]
        for _ in range(chance.randrange(6)):
            scheduler.turn()
        if chance.random() < 0.5:
            scheduler.cancel(tickets.pop(given_up := chance.randrange(AT_ONCE)))
            del asked[given_up], works[given_up]
        for ticket, graph, prompt in zip(tickets, works, asked, strict=True):
            answer = tokens_of(list(scheduler.steps(ticket)))
            graph.prefixes = None
            if answer != (want := tokens_of(list(graph.decode(prompt)))):
                found.append(f"request {number}: {answer}, without reuse {want}")
        found += [f"request {number}: {fault}" for fault in faults(store, caches)]
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    growth = (sizes[-1] - sizes[len(sizes) // 2]) / 2**20
    if growth > GROWTH_MB:
        found.append(f"{growth:.0f} MB more at the end than half-way")
    if not store.hits:
        found.append("no request found a beginning of its prompt")
    return found


def faults(store: PrefixStore, caches: CachePool) -> list[str]:
    """Say what requests that have ended have left, and what is kept beyond the budget."""
    shelf = store.shelf
    indexed = {*store._videos.values(), *store._endings.values(), *store._others.values()}
    indexed |= {entry for texts in store._texts.values() for entry in texts}
    checks = {
        f"{shelf.nbytes()} bytes on the device": shelf.nbytes() > BUDGET,
        f"{shelf.nbytes(on_host=True)} bytes on the host": shelf.nbytes(on_host=True) > BUDGET,
        "entries are in use": any(item.users for item in shelf.items),
        "prefills are claimed": bool(store._claims),
        "caches are leased": bool(caches._leased),
        "entries without a key, or keys without an entry": indexed != shelf.items,
        "wrong numbers of children": any(
            item.children != sum(other.parent is item for other in shelf.items) for item in shelf.items
        ),
        "entries whose parent is gone": any(item.parent is not None and item.parent not in shelf.items for item in shelf.items),
    }
    return [what for what, wrong in checks.items() if wrong]
