"""Measure the costs of drafting and checking for a few tree shapes on this machine, and fit a model for all others.

Measures whole rounds of the real loop, so host work, cache moves and graph replays are included.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Self

import numpy as np
import torch
from numpy.typing import NDArray

from specvlm.decoding.loop import DecodingGraph
from specvlm.errors import UserError, message
from specvlm.parsing.bounds import Seconds, parse
from specvlm.parsing.files import json_of, read_text
from specvlm.results.metrics import DRAFTER_START, FIRST_TOKEN
from specvlm.results.records import Share, Tokens
from specvlm.strategies import registry
from specvlm.types import KeepSet, Step, TreeShape, VideoPrompt, Within
from specvlm.types.costs import RoundCost

ROUNDS = 20  # most rounds of a decode; the first two are warm-up
# In a shape such as 16x1x1, every draft pass but the first has 16 rows: this isolates the cost of a pass of 16 rows.
WIDEST = "16x1x1"
PROBES = (WIDEST, "8x1x1x1", "4x1x1x1x1", "paper", "chain:8", "chain:3")
PROBES_OF_SELF = ("chain:5", "chain:3", "chain:2")
KNOT_FACTOR = 1.3  # least factor between knots, the tree sizes where the fit may bend; more knots would follow noise
CHECK = ("verify", "host")  # parts of a round's time that count as its check
SHORTEST = 4  # fewest tokens of an answer to measure on
MISFIT = 0.1  # a larger relative error of the fit suggests that the machine was busy
Milliseconds = Annotated[float, Within(1e-6, 1e9)]


@dataclass(frozen=True)
class Timing:
    """Median times over a shape's rounds.

    context: length of the drafter's prompt in tokens; check_ms: verification and the host's work in the round.
    """

    drafter: str
    shape: str
    ratio: Share
    context: Tokens
    draft_ms: Milliseconds
    check_ms: Milliseconds


@dataclass(frozen=True)
class Start:
    """Seconds before the first round of a drafter at a ratio.

    first_s: embed + prefill of the target; draft_s: prune + prefill of the drafter.
    """

    drafter: str
    ratio: Share
    first_s: Seconds
    draft_s: Seconds


class Curve:
    """Fitted cost in ms of a round's forward passes: a constant, and for each pass a cost by rows and one by context.

    The cost by rows is linear between knots; with one knot, it is the same for every pass. The cost by context is
    linear. Minimises absolute relative errors, so that a single disturbed probe does not bend the curve. A term that
    would be negative is left out.
    """

    def __init__(self, passes: Sequence[Sequence[int]], contexts: Sequence[int], ms: Sequence[float], knots: Sequence[int]):
        """Fit to measured rounds. passes: per round, the rows of each pass; contexts, ms: per round; knots: in rows."""
        self.knots = np.array(sorted(knots), dtype=float)
        # Whether the data can tell the cost of context, and the constant, from the rest.
        self.varied = len(set(contexts)) > 1, len({len(rows) for rows in passes}) > 1
        relative = np.array([self.columns(*seen) for seen in zip(passes, contexts, strict=True)]) / np.array(ms)[:, None]
        weights = np.ones(len(ms))
        for _ in range(20):  # iteratively reweighted least squares
            self.costs = _positive(relative * weights[:, None], weights)
            weights = np.maximum(np.abs(relative @ self.costs - 1), 0.01) ** -0.5

    def columns(self, rows: Sequence[int], context: int) -> list[float]:
        """Return the factor of each fitted cost, for passes with these rows over a context."""
        by_context, constant = self.varied
        fixed = [float(constant), float(len(rows) * context * by_context)]
        if len(self.knots) == 1:
            return [*fixed, float(len(rows))]
        weights = np.zeros(len(self.knots))
        for count in rows:
            left = int(np.clip(np.searchsorted(self.knots, count) - 1, 0, len(self.knots) - 2))
            share = (count - self.knots[left]) / (self.knots[left + 1] - self.knots[left])
            weights[left : left + 2] += 1 - share, share
        return [*fixed, *weights]

    def __call__(self, rows: Sequence[int], context: int = 0) -> float:
        """Predicted ms of passes with these rows over a context."""
        return float(np.dot(self.costs, self.columns(rows, context)))


def _positive(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Approximate non-negative least squares of rows @ x = wanted: fix the lowest x at 0 until none is negative."""
    costs = np.zeros(rows.shape[1])
    used = [at for at in range(rows.shape[1]) if rows[:, at].any()]
    while used:
        found = np.linalg.lstsq(rows[:, used], wanted, rcond=None)[0]
        if (found >= 0).all():
            costs[used] = found
            break
        used.pop(int(found.argmin()))
    return costs


@dataclass(frozen=True)
class Costs:
    """Measured costs for one prompt.

    Attributes:
        text: Text tokens of the prompt.
        video: Video tokens of the prompt.
        alone_ms: Time per token of the target alone, after the first token.
        alone_first_s: Time to first token of the target alone.
        timings: Measured times of a round, by drafter, shape and ratio.
        starts: Measured starts by drafter and ratio.
        machine: Name of the GPU or CPU.
        shared: Measured rounds of concurrent requests: of the target alone, and with `tree` as drafter.
    """

    text: Tokens
    video: Tokens
    alone_ms: Milliseconds
    alone_first_s: Seconds
    timings: tuple[Timing, ...]
    starts: tuple[Start, ...] = ()
    machine: str = ""
    shared: tuple[RoundCost, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the costs.json of an earlier profile. Raises UserError if it is not one."""
        try:
            found = parse(cls, json_of(read_text(path)), "it")
            found.check()
            return found
        except (OSError, ValueError) as error:
            raise UserError(f"costs={path} is not a costs.json of an earlier profile ({message(error)})") from None

    def check(self) -> None:
        """Raise ValueError if a tree shape is invalid, there are no starts, or a drafter has a start but no timing."""
        for timing in self.timings:
            TreeShape.parse(timing.shape)
        timed = {timing.drafter for timing in self.timings}
        if not self.starts or not timed.issuperset(start.drafter for start in self.starts):
            raise ValueError("its timings and starts are not of the same drafters")

    def context(self, ratio: float) -> int:
        """Length of the drafter's prompt at this ratio, in tokens."""
        return self.text + KeepSet.budget(self.video, ratio)

    @cached_property
    def _drafts(self) -> dict[str, Curve]:
        """Cost of a round's draft passes, fitted for each drafter."""
        curves = {}
        for drafter in dict.fromkeys(t.drafter for t in self.timings):
            seen = [t for t in self.timings if t.drafter == drafter]
            passes = [rows_of(t.shape) for t in seen]
            widest = max(map(max, passes))
            knots = [w for w in (1, 4, 8, 16) if w <= widest]  # the widths of PROBES
            curves[drafter] = Curve(passes, [t.context for t in seen], [t.draft_ms for t in seen], knots)
        return curves

    @cached_property
    def _checks(self) -> Curve:
        """Cost of a round's check by tree size, fitted to all timings and the target alone, which is a tree of 1."""
        nodes = [len(TreeShape.parse(t.shape)) for t in self.timings] + [1]
        ms = [t.check_ms for t in self.timings] + [self.alone_ms]
        knots = [1]
        for count in sorted(nodes):
            if count >= KNOT_FACTOR * knots[-1]:
                knots.append(count)
        return Curve([(count,) for count in nodes], [0] * len(nodes), ms, knots)

    def draft_ms(self, drafter: str, shape: str, ratio: float) -> float:
        """Predict the draft time of a round in ms."""
        return self._drafts[drafter](rows_of(shape), self.context(ratio))

    def check_ms(self, shape: str) -> float:
        """Predict the time of a round's verification and host work in ms."""
        return self._checks((len(TreeShape.parse(shape)),))

    def misfit(self) -> float:
        """Worst relative error of the fit on the measured rounds; large if the machine was busy."""
        rounds = ((self.draft_ms(t.drafter, t.shape, t.ratio) + self.check_ms(t.shape), t) for t in self.timings)
        return max((abs(fitted / (t.draft_ms + t.check_ms) - 1) for fitted, t in rounds), default=0.0)

    def start(self, drafter: str, ratio: float) -> Start:
        """Find the drafter's measured start at the ratio nearest to `ratio`."""
        return min((s for s in self.starts if s.drafter == drafter), key=lambda s: abs(s.ratio - ratio))


def predict(costs: Costs, shape: str, ratio: float, accepted: float, drafter: str = "tree") -> float:
    """Predict ms per token, without prefills.

    Args:
        costs: Measured costs.
        shape: Tree shape.
        ratio: Share of the video tokens to drop.
        accepted: Guesses accepted per round, without the bonus token.
        drafter: `tree` or `self`.
    """
    return (costs.draft_ms(drafter, shape, ratio) + costs.check_ms(shape)) / (accepted + 1)


def rows_of(shape: str) -> tuple[int, ...]:
    """Number of rows of each draft pass of a round."""
    return tuple(map(len, TreeShape.parse(shape).levels))


def probes(ratios: Iterable[float], drafter: str = "tree") -> list[tuple[str, float]]:
    """List the (shape, ratio) pairs that a profile decodes.

    `tree`: every shape at the ratio nearest 0.9 and one shape at the others; `self`: every shape at every ratio. The
    first pair needs the largest caches, so nothing is allocated twice. Each ratio includes a shape that was decoded
    before, since the first decode of a shape includes the engine's capture in the drafter's start.
    """
    ordered = sorted(set(ratios))
    main = min(ordered, key=lambda ratio: abs(ratio - 0.9))
    if drafter == "self":
        return [(shape, ratio) for ratio in ordered for shape in (PROBES_OF_SELF[0], *PROBES_OF_SELF)]
    at_main, others = [(shape, main) for shape in PROBES], [("chain:8", ratio) for ratio in ordered if ratio != main]
    return [(WIDEST, ordered[0]), *at_main, *others]


@dataclass(frozen=True)
class Profile:
    """Result of `profile`. answer: tokens of the target alone; kept: tokens the pruner kept, by (drafter, ratio)."""

    costs: Costs
    answer: tuple[int, ...]
    kept: dict[tuple[str, float], KeepSet]


def profile(
    graph: DecodingGraph,
    prompt: VideoPrompt,
    alone: Callable[[], Iterator[Step]],
    ratios: Mapping[str, Sequence[float]],
    limit: int,
    advance: Callable[[], None] = lambda: None,
) -> Profile:
    """Measure costs by short decodes. If the fit shows a busy machine, measure again and take the better times.

    Args:
        graph: The pair and its options.
        prompt: The prompt.
        alone: Starts `autoregressive` on the same prompt.
        ratios: Ratios by drafter (`tree` or `self`).
        limit: Most new tokens per decode.
        advance: Called after each measurement: two of the target alone, one per pair of `probes`, and repetitions.

    Raises:
        UserError: The answer has fewer than SHORTEST tokens.
    """
    wanted = [(drafter, shape, ratio) for drafter, every in ratios.items() for shape, ratio in probes(every, drafter)]
    plain: list[list[Step]] = []
    decodes: dict[tuple[str, str, float], list[list[list[Step]]]] = {at: [] for at in wanted}
    for passed in range(2):
        for _ in range(2 - passed):  # the first one is the warm-up
            plain.append(watched(alone()))
            advance()
        answer = tuple(token for step in plain[0] for token in step.tokens)
        if len(answer) < SHORTEST:
            raise UserError(f"the target's answer has {len(answer)} tokens, too few to measure on: ask another question")
        for drafter, shape, ratio in wanted:
            strategy = registry.build("drafter", {"name": drafter, "shape": shape})
            again = rounds_of(replace(graph, drafter=strategy, options=replace(graph.options, ratio=ratio)), prompt, limit)
            decodes[drafter, shape, ratio].append(again)
            advance()
        found = _profile(graph, prompt, answer, plain, decodes)
        if found.costs.misfit() <= MISFIT / 2:
            break
    return found


def _profile(
    graph: DecodingGraph,
    prompt: VideoPrompt,
    answer: tuple[int, ...],
    plain: Sequence[Sequence[Step]],
    decodes: Mapping[tuple[str, str, float], Sequence[Sequence[Sequence[Step]]]],
) -> Profile:
    """Compute costs. plain: decodes by the target alone; decodes: by (drafter, shape, ratio), a list per repetition."""
    video, timings, kept = len(prompt.video_index), [], {}
    # Prefill time depends on whether the target records attention for the pruner, not on the ratio.
    first_s = {False: [_sum(steps[0], FIRST_TOKEN) for steps in plain], True: []}
    draft_s: dict[tuple[str, float], list[float]] = {}
    for (drafter, shape, ratio), passes in decodes.items():
        keep = passes[0][0][1].keep
        assert keep is not None
        kept[drafter, ratio] = keep
        every = [steps for one in passes for steps in one]
        first_s[0 < len(keep) < video] += [_sum(steps[0], FIRST_TOKEN) for steps in every]
        draft_s.setdefault((drafter, ratio), []).extend(_sum(steps[1], DRAFTER_START) for steps in every)
        draft_ms, check_ms = (min(part_ms(one, *parts) for one in passes) for parts in (("draft",), CHECK))
        timings.append(Timing(drafter, shape, ratio, len(prompt) - video + len(keep), draft_ms, check_ms))
    starts = [Start(*at, min(first_s[0 < len(kept[at]) < video]), min(seconds)) for at, seconds in draft_s.items()]
    alone_ms = min(part_ms([steps], *CHECK) for steps in plain)
    gpu = graph.target.device.type == "cuda"
    machine = torch.cuda.get_device_name(graph.target.device) if gpu else platform.machine()
    costs = Costs(len(prompt) - video, video, alone_ms, min(first_s[False]), tuple(timings), tuple(starts), machine)
    return Profile(costs, answer, kept)


def rounds_of(graph: DecodingGraph, prompt: VideoPrompt, limit: int, rounds: int = ROUNDS) -> list[list[Step]]:
    """Decode up to four times, until there are `rounds` / 2 rounds. Returns decodes, each [prefill, round, …]."""
    decodes: list[list[Step]] = []
    while len(decodes) < 4 and sum(len(steps) - 1 for steps in decodes) < rounds // 2:
        decodes.append(watched(graph.decode(prompt, limit), 1 + rounds))
    return decodes


def watched(steps: Iterator[Step], count: int | None = None) -> list[Step]:
    """Take up to `count` steps and add a part `host` to their times: wall time that no other part covers."""
    seen: list[Step] = []
    while count is None or len(seen) < count:
        before = perf_counter()
        step = next(steps, None)
        if step is None:
            break
        host = perf_counter() - before - sum(step.times_s.values())
        seen.append(replace(step, times_s=step.times_s | {"host": max(host, 0.0)}))
    return seen


def part_ms(decodes: Iterable[Sequence[Step]], *parts: str) -> float:
    """Median over rounds of the sum of `parts`, in ms. Skips the first two rounds of each decode if there are more."""
    rounds = [step for steps in decodes for step in (steps[3:] or steps[1:])]
    return 1000 * median(_sum(step, parts) for step in rounds)


def _sum(step: Step, parts: Iterable[str]) -> float:
    return sum(step.times_s.get(part, 0.0) for part in parts)
