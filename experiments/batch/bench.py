"""Measure requests of one pair that decode at the same time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch

from experiments.batch.cells import Cell
from experiments.batch.drafter import ChanceDrafter
from experiments.gpu_pair.measure import kv_bytes, weight_bytes
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.scheduler import Decoding, Scheduler, Ticket
from specvlm.engine import Engine
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, Step, VideoPrompt

WARM, WARM_AUTO = 4, 24  # rounds of all requests that are not measured; `auto` learns its costs in them


@dataclass
class Bench:
    """One pair and one engine.

    Attributes:
        target: Target model.
        draft: Draft model.
        engine: Engine that runs the passes.
        rounds: Measured rounds.
        caches: Caches, kept between measurements.
        known: Each prompt's answer by the target, by number of the request.
    """

    target: VideoLM
    draft: VideoLM
    engine: Engine
    rounds: int
    caches: CachePool = field(default_factory=CachePool)
    known: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def alone(self, prompt: VideoPrompt, limit: int) -> Decoding:
        """Decode by the target alone."""
        return autoregressive_work(self.target, prompt, limit, GreedyVerifier(), self.caches, self.engine)

    def speculative(self, number: int, prompt: VideoPrompt, limit: int, tree: str, ratio: float, chance: float) -> Decoding:
        """Decode with guesses that are right by chance."""
        graph = DecodingGraph(
            self.target,
            self.draft,
            UniformPruner(),
            ChanceDrafter(TreeDrafter(tree), self.known[number], accepted=0.0, chance=chance),
            GreedyVerifier(),
            caches=self.caches,
            engine=self.engine,
        )
        return graph.work(prompt, GenerationOptions(max_new_tokens=limit, ratio=ratio, seed=number))

    def run(self, works: Sequence[Decoding], rounds: int, warm: int = WARM, stagger: int = 0) -> dict[str, Any]:
        """Run requests for some rounds beyond the first ones; return times, tokens and passes per round."""
        scheduler = Scheduler(self.engine)
        tickets, seen = list[Ticket](), list[list[Step]]()
        walls, tokens = list[float](), list[int]()
        for work in works:
            tickets.append(scheduler.submit(work))
            seen.append([])
            for _ in range(stagger):
                one_round(scheduler, tickets, seen)
        start = [0] * len(works)
        while len(walls) < rounds + warm:
            if len(walls) == warm:
                start = [len(steps) for steps in seen]
            before = perf_counter()
            found = one_round(scheduler, tickets, seen)
            walls.append(perf_counter() - before)
            tokens.append(found)
        for ticket in reversed(tickets):  # the pool gives the last cache first: each request gets its own again
            scheduler.cancel(ticket)
        kept, made = walls[warm:], sum(tokens[warm:])
        guesses = Counter(step.drafted for steps, first in zip(seen, start, strict=True) for step in steps[first:])
        return {
            "round_ms": 1000 * median(kept),
            "mean_round_ms": 1000 * sum(kept) / len(kept),
            "tokens_per_s": made / sum(kept),
            "tokens_a_round": made / len(kept) / len(works),
            "ms_per_token": 1000 * sum(kept) * len(works) / made,
            "rounds": len(kept),
            "guesses": {str(count): often for count, often in sorted(guesses.items())},
            "answers": {number: [token for step in steps for token in step.tokens] for number, steps in enumerate(seen)},
        }


def one_round(scheduler: Scheduler, tickets: Sequence[Ticket], seen: Sequence[list[Step]]) -> int:
    """Take turns until each request has made a step. Returns the number of new tokens."""
    made, waiting = 0, set(range(len(tickets)))
    while waiting:
        scheduler.turn()
        for number, ticket in enumerate(tickets):
            if ticket.error is not None:
                raise ticket.error
            while ticket.steps:
                seen[number].append(ticket.steps.popleft())
                made += len(seen[number][-1].tokens)
                waiting.discard(number)
    return made


def passes_of(engine: Engine, requests: int) -> dict[str, float]:
    """Time captured joined passes of so many requests, whose caches still exist, on the device alone: ms by shape."""
    found = {}
    for key, (owner, program) in getattr(engine, "_programs", {}).items():
        if key[0] != "batch" or key[2] != 1 << (requests - 1).bit_length() or program.graph is None:
            continue
        times = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            program.graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        layers = len(owner().layers)
        found[f"{layers} layers, {key[1]} rows, {key[2]} requests"] = round(median(times), 3)
    return found


def measured(bench: Bench, prompts: Sequence[VideoPrompt], cell: Cell, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Measure a cell: by the target alone, then with each tree and ratio. Yields rows as they are found."""
    target, shapes = bench.target, [shape for tree in cell.trees for shape in TreeDrafter(tree).shapes]
    warm = WARM_AUTO if "auto" in cell.trees else WARM
    limit = (bench.rounds + warm + 2 + cell.stagger * cell.requests) * (max(shape.depth for shape in shapes) + 1) + 2
    most = max(map(len, shapes))
    # A cache for each request, as large as the largest tree needs, so that none is replaced.
    held = [bench.caches.take("target", target, len(prompt) + limit + most) for prompt in prompts]
    for cache in held:
        bench.caches.give_back("target", cache)
    steps = limit - WARM - 2 - cell.stagger * cell.requests
    alone = bench.run([bench.alone(prompt, limit) for prompt in prompts], steps, stagger=cell.stagger)
    bench.known = {number: tuple(answer) for number, answer in alone.pop("answers").items()}
    bytes_read = weight_bytes(target) + sum(kv_bytes(target, len(prompt)) for prompt in prompts)
    floor_ms = 1000 * bytes_read / bandwidth
    yield {"part": "alone", **alone, "floor_ms": floor_ms, "over_floor": alone["round_ms"] / floor_ms}
    for tree in cell.trees:
        for ratio in cell.ratios:
            works = [
                bench.speculative(number, prompt, limit, tree, ratio, cell.chance) for number, prompt in enumerate(prompts)
            ]
            spent = bench.engine.capture_s
            found = bench.run(works, bench.rounds, WARM_AUTO if tree == "auto" else WARM, cell.stagger)
            answers = found.pop("answers").items()
            same = all(answer[: len(bench.known[n])] == list(bench.known[n][: len(answer)]) for n, answer in answers)
            against = {"against_alone": found["tokens_per_s"] / alone["tokens_per_s"], "same_tokens": same}
            spent = bench.engine.capture_s - spent
            yield {"part": "speculative", "tree": tree, "ratio": ratio, **found, **against, "capture_s": spent}
