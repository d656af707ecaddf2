"""Many requests in one process: memory, open files and threads stay what they are, and every answer is right.

Between them requests are given up half-way, and strategies raise.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from campaign.fork import Child, preload
from specvlm.app.compose import compose
from specvlm.app.model_cache import ModelCache
from specvlm.app.placement import places_of
from specvlm.app.prepare import Prepared, own_sample, read, set_up
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Drafter, DraftSession, PruneContext, Pruner
from specvlm.types import DraftTree

COUNT, SAMPLE = 300, 6  # one of each kind of misuse

KINDS = ("MB", "open files", "threads")
GROWTH_MB = 64  # over the second half: what the allocator of the C library keeps or gives back
PAIRS = ("embedded_qwen2_5_vl", "embedded_llava_onevision")
QUESTIONS = ("describe the video.", "what color is the first object?", "how many objects are there?", "does a star appear?")
STRATEGIES = {
    "drafter": ("chain", "dynamic_tree", "prompt_lookup", "self", "sparse"),
    "pruner": ("two_stage", "uniform", "fastv", "verifier_attention"),
    "reader": ("decord", "pyav"),
}


@dataclass(frozen=True)
class RaisingPruner(Pruner):
    """Raises when it is asked."""

    name = "raising"

    def select(self, ctx: PruneContext):
        raise RuntimeError("the pruner raises")


class RaisingSession(DraftSession):
    """Raises in the third round."""

    rounds = 0

    def propose(self, last):
        self.rounds += 1
        if self.rounds == 3:
            raise RuntimeError("the drafter raises")
        return DraftTree(torch.tensor([self.ctx.bonus if last is None else last.bonus, 5, 6]), (-1, 0, 1))


class RaisingDrafter(Drafter):
    """Its sessions raise in their third round."""

    name, model, max_nodes = "late", None, 4

    def start(self, ctx):
        session = RaisingSession()
        session.ctx = ctx
        return session


@dataclass(frozen=True)
class Asked:
    """What an answer depends on."""

    pair: str
    video: str
    question: str
    frames: int
    max_new_tokens: int

    @classmethod
    def random(cls, pair: str, chance: random.Random) -> Asked:
        sizes = chance.choice((2, 4)), chance.choice((3, 8, 16))
        return cls(pair, f"synthetic_{chance.randrange(1, 3)}", chance.choice(QUESTIONS), *sizes)

    def prepared(self, held: ModelCache, *words: str) -> Prepared:
        cfg = compose([*(f"{key}={value}" for key, value in vars(self).items()), *words])
        setup = set_up(cfg, places_of(cfg))
        return held.plan(setup, read(setup, own_sample(cfg)))


class Requests:
    """One process's requests, one after the other."""

    def __init__(self, seed: int) -> None:
        self.chance, self.held, self.half_read = random.Random(seed), ModelCache(), []
        self.truth = cache(self._truth)

    def serve(self, number: int, pair: str) -> list[str]:
        """One request, and beside it what goes wrong this time. Returns what is wrong that should not be."""
        asked, chance = Asked.random(pair, self.chance), self.chance
        words = [f"{key}={chance.choice(values)}" for key, values in STRATEGIES.items()]
        request = asked.prepared(self.held, *words)
        graph = self.held.graph(request)
        self._misuse(number, graph, request, asked)
        answer = tokens_of(list(graph.decode(request.prompt, asked.max_new_tokens)))
        wrong = ["a wrong answer"] * (answer != self.truth(asked))
        return [f"request {number} {asked} {words}: {what}" for what in wrong + self._gone_on()]

    def _gone_on(self) -> list[str]:
        """A request that waited while others were answered goes on as if it had been alone."""
        found = []
        for asked, tokens, steps in self.half_read:
            step = next(steps, None)
            tokens += () if step is None else step.tokens
            if tokens != self.truth(asked)[: len(tokens)]:
                found.append("a request that had waited went on with other tokens")
        return found

    def _misuse(self, number: int, graph: DecodingGraph, request: Prepared, asked: Asked) -> None:
        limit = request.cfg.max_new_tokens
        if number % 6 == 1:
            steps = graph.decode(request.prompt, limit)
            self.half_read = [*self.half_read, (asked, [*next(steps).tokens], steps)][-2:]  # the others are let go
        broken = {3: replace(graph, pruner=RaisingPruner()), 5: replace(graph, drafter=RaisingDrafter())}.get(number % 6)
        with suppress(RuntimeError):
            list(broken.decode(request.prompt, limit) if broken else ())

    def _truth(self, asked: Asked) -> list[int]:
        """With fresh caches, one token at a time."""
        request = asked.prepared(self.held, "drafter=chain", "pruner=uniform")
        graph = self.held.graph(request)
        return tokens_of(list(autoregressive(graph.target, request.prompt, asked.max_new_tokens, graph.verifier)))


def footprint() -> tuple[int, int, int]:
    """MB in memory, open files, threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (pages * os.sysconf("SC_PAGESIZE") >> 20, *(len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")))


def serve_all(count: int, seed: int) -> int:
    """In a process of its own: prints what it finds on stderr, and what it uses on stdout."""
    requests, used = Requests(seed), []
    for number in range(count):
        pair = PAIRS[4 * number // count % 2]  # both twice: the second half loads nothing new
        for finding in requests.serve(number, pair):
            print(finding, file=sys.stderr)
        if (number + 1) % max(1, count // 12) == 0:
            used.append(footprint())
            print(
                f"leaks: after {number + 1} requests {used[-1][0]} MB, {used[-1][1]} files, {used[-1][2]} threads", flush=True
            )
    half = used[len(used) // 2 :]
    growth = [max(later) - first for first, later in zip(half[0], zip(*half, strict=True), strict=True)]
    for kind, grown, allowed in zip(KINDS, growth, (GROWTH_MB, 0, 0), strict=True):
        if grown > allowed:
            print(f"{grown} more {kind} at the end than half-way", file=sys.stderr)
    return 0


def run(count: int, seed: int) -> list[str]:
    preload()
    with tempfile.TemporaryDirectory() as name:
        ended = Child(lambda: serve_all(count, seed), Path(name, "leaks"), memory_gb=24).wait(3600)
    print(ended.out, end="")
    crashed = [f"exit code {ended.code}"] if ended.code else []
    return crashed + [line for line in ended.err.splitlines() if line.strip()]
