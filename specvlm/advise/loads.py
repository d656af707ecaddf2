"""Predict the times of concurrent requests, from rounds measured with a few numbers of requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from time import perf_counter

import torch

from specvlm.advise.acceptance import Known
from specvlm.advise.advice import WORTH
from specvlm.advise.costs import Costs
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prices import Prices
from specvlm.decoding.room import cache_bytes
from specvlm.decoding.scheduler import Decoding, Scheduler, Ticket
from specvlm.session.room import room_for
from specvlm.strategies import registry
from specvlm.types import Step, TreeShape, VideoPrompt
from specvlm.types.costs import RoundCost, sizes_of_round

COUNTS = (1, 2, 4, 8, 12, 16)  # numbers of requests to predict for
MEASURED = (1, 2, 4, 8)  # … and to measure, as far as they fit into memory
PROBES = ("chain:2", "chain:6")
ROUNDS, WARM = 10, 3  # rounds of a measurement, and rounds before them to warm up


@dataclass(frozen=True)
class Load:
    """Predicted times of concurrent requests.

    Attributes:
        requests: Number of requests.
        ratio: Share of the video tokens to drop; None for the target alone.
        shape: The tree that gives the most tokens per second; empty for the target alone.
        token_ms: Milliseconds per token of one request.
    """

    requests: int
    ratio: float | None
    shape: str
    token_ms: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all requests."""
        return 1000 * self.requests / self.token_ms


def prices_of(shared: Sequence[RoundCost], ratio: float) -> Prices:
    """Fit prices to the measured rounds without a draft, and to those at the measured ratio nearest to `ratio`."""
    nearest = min((one.ratio for one in shared if one.passes), key=lambda at: abs(at - ratio), default=ratio)
    return Prices(one for one in shared if not one.passes or one.ratio == nearest)


def round_ms(prices: Prices, shape: TreeShape, requests: int) -> float:
    """Predict the ms of a round that `requests` requests share, each with a tree of this shape."""
    passes, rows, draft_rows = sizes_of_round(shape)
    return prices.round_ms(requests, rows * requests, passes, draft_rows * requests)


def loads(costs: Costs, known: Known, shapes: Sequence[str], ratios: Sequence[float], most: int) -> list[Load]:
    """Predict the times of the target alone and of the best tree at each ratio, for the COUNTS up to `most`."""
    found = list[Load]()
    prices = {ratio: prices_of(costs.shared, ratio) for ratio in ratios}
    trees = {shape: TreeShape.parse(shape) for shape in shapes}
    root = TreeShape.from_paths([])
    for count in (count for count in COUNTS if count <= most):
        found.append(Load(count, None, "", round_ms(prices[ratios[0]], root, count)))
        for ratio in ratios:
            guess = known[min((key for key in known if key[0] == "tree"), key=lambda key: abs(key[1] - ratio))]
            every = {name: round_ms(prices[ratio], tree, count) / (1 + guess.accepted(tree)) for name, tree in trees.items()}
            best = min(every, key=lambda name: every[name])
            found.append(Load(count, ratio, best, every[best]))
    return found


def verdict(found: Sequence[Load]) -> str:
    """Say up to how many requests speculation pays."""
    alone = {one.requests: one.token_ms for one in found if one.ratio is None}
    best = {count: min(one.token_ms for one in found if one.requests == count and one.ratio is not None) for count in alone}
    slow = [count for count in alone if best[count] >= WORTH * alone[count]]
    ends = next((count for count in alone if all(later in slow for later in alone if later >= count)), None)
    if ends is None:
        told = f"Speculation pays at up to {max(alone)} requests at once"
        but = [str(count) for count in slow]
        return f"{told}, but not at {', '.join(but)}." if but else f"{told}."
    return (
        f"Do not speculate with {ends} or more requests at once."
        if ends > 1
        else "Do not speculate, for any number of requests."
    )


def measure(graph: DecodingGraph, prompt: VideoPrompt, ratios: Sequence[float], most: int) -> Iterator[RoundCost]:
    """Measure rounds that several equal requests share, by the target alone and with `tree`.

    Measures the numbers of requests in MEASURED up to `most`, and ends early if their caches do not fit into memory.
    """
    options = replace(graph.options, max_new_tokens=(ROUNDS + WARM + 2) * 7, stop_ids=frozenset(), stop=(), record=False)
    models = [model for model in (graph.target, graph.draft) if model is not None]
    widest = _with(graph, PROBES[-1])
    for count in (count for count in MEASURED if count <= most):
        size = count * cache_bytes(widest, prompt, replace(options, ratio=min(ratios)))
        if count > 1 and size > room_for(models) + graph.caches.nbytes:
            return
        rule = graph.verifier, graph.caches, graph.engine
        alone = [autoregressive_work(graph.target, prompt, options, *rule) for _ in range(count)]
        yield RoundCost(count, count, 0, 0, 0.0, sum(_timed(graph, alone)))
        for ratio, shape in product(ratios, PROBES):
            own = _with(graph, shape)
            times = _timed(graph, [own.work(prompt, replace(options, ratio=ratio)) for _ in range(count)])
            yield RoundCost.of_shape(TreeShape.parse(shape), count, *times, ratio)


def _with(graph: DecodingGraph, shape: str) -> DecodingGraph:
    """Copy a graph with a static tree of this shape."""
    return replace(graph, drafter=registry.build("drafter", {"name": "tree", "shape": shape}))


def _timed(graph: DecodingGraph, works: Sequence[Decoding]) -> tuple[float, float]:
    """Return the median ms of drafting, and of the rest, over rounds of requests that run together."""
    scheduler = Scheduler(graph.engine)
    tickets = [scheduler.submit(work) for work in works]
    rounds = list[tuple[float, float]]()
    try:
        with torch.inference_mode():
            for _ in range(ROUNDS + WARM + 1):
                before = perf_counter()
                steps = _round(scheduler, tickets)
                draft_s = min(step.times_s.get("draft", 0.0) for step in steps)
                rounds.append((1000 * draft_s, 1000 * (perf_counter() - before - draft_s)))
    finally:
        for ticket in reversed(tickets):  # the pool returns the last cache first, so that each request gets its own again
            scheduler.cancel(ticket)
    kept = rounds[WARM + 1 :]
    return median(draft for draft, _ in kept), median(check for _, check in kept)


def _round(scheduler: Scheduler, tickets: Sequence[Ticket]) -> list[Step]:
    """Take turns until each request has made a step. Returns the last step of each."""
    last: dict[int, Step] = {}
    while len(last) < len(tickets):
        scheduler.turn()
        for number, ticket in enumerate(tickets):
            if ticket.error is not None:
                raise ticket.error
            while ticket.steps:
                last[number] = ticket.steps.popleft()
    return [last[number] for number in range(len(tickets))]
