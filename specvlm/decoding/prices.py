"""Predict the time of a round of several requests from measured rounds.

A prediction is the weighted mean of a linear fit and the smoothed time of exactly these sizes. The latter weighs more,
the more often and the more recently they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from specvlm.types.costs import RoundCost

Sizes: TypeAlias = tuple[float, ...]

# All constants of the measurement.
CHECK_SHARES = (1.0, 0.02, 0.02)  # assumed relative cost of the target's pass: the pass itself, each request, each row
DRAFT_SHARES = (0.05, 0.2, 0.01)  # assumed cost of drafting, in passes of the target: each round, each pass, each row
FASTER, SLOWER = 0.5, 0.1  # smoothing weights of a time below and above the smoothed one: longer times are often delays
LONGEST = 2.0  # times are clipped to this multiple of the smoothed one
FADES = 0.98  # decay of a time's weight with each round of other sizes
SURE = 8  # number of measurements after which they count as much as the fit
KEPT = 64  # sizes whose times are kept
ASSUMED = 0.001  # weight of the assumed costs, where a measured time has 1
REFIT = 8  # rounds between two fits, after the first REFIT rounds


class Meter:
    """Predicts a time in ms from sizes: a linear fit, corrected if these sizes were measured often and recently.

    Args:
        shares: Assumed relative cost of each size. Measured times gradually replace them in the fit.
        scale: Milliseconds per unit of `shares` before anything was measured.
    """

    def __init__(self, shares: Sequence[float], scale: float = 1.0) -> None:
        self.shares, self.costs = np.array(shares), scale * np.array(shares)
        self.times: dict[Sizes, tuple[float, int, int]] = {}  # smoothed ms, last round in which it was seen, and how often
        self.round = 0

    def saw(self, sizes: Sizes, ms: float) -> None:
        """Add a measured time, smoothed with earlier ones of the same sizes."""
        self.round += 1
        old, _, often = self.times.pop(sizes, (0.0, 0, 0))
        if often:
            ms = old + (FASTER if ms < old else SLOWER) * (min(ms, LONGEST * old) - old)
        self.times[sizes] = ms, self.round, often + 1
        if len(self.times) > KEPT:
            del self.times[next(iter(self.times))]
        if self.round < REFIT or self.round % REFIT == 0:
            self.fit()

    def know(self, sizes: Sizes, ms: float) -> None:
        """Add a time that was measured earlier, over many rounds. Call `fit` after the last."""
        if ms > 0:
            self.times[sizes] = ms, self.round, SURE

    def fit(self) -> None:
        """Fit the costs to the times: least squares of relative errors, pulled towards the assumed costs."""
        sizes, (ms, seen, often) = np.array([*self.times]), np.array([*self.times.values()]).T
        weights = FADES ** (self.round - seen) * np.minimum(often, SURE) / SURE
        scaled = np.median(ms / (sizes @ self.shares)) * self.shares
        rows, used = sizes * scaled / ms[:, None], np.ones(len(scaled), dtype=bool)
        factors = np.zeros(len(scaled))
        while used.any():
            part = rows[:, used] * weights[:, None]
            found = np.linalg.solve(part.T @ rows[:, used] + ASSUMED * np.eye(used.sum()), part.sum(0) + ASSUMED)
            if (found >= 0).all():
                factors[used] = found
                break
            used[np.flatnonzero(used)[found.argmin()]] = False
        self.costs = scaled * factors

    def __call__(self, sizes: Sizes) -> float:
        """Predict the time in ms for these sizes."""
        fitted = float(np.dot(self.costs, sizes))
        ms, seen, often = self.times.get(sizes, (0.0, 0, 0))
        known = FADES ** (self.round - seen) * often / (often + SURE)
        return known * ms + (1 - known) * fitted


class Prices:
    """Predicts times of rounds for one pair of target and draft on one engine.

    Sizes of the target's pass are (1, requests, rows), those of drafting (1, passes, draft rows): see `RoundCost`.

    Args:
        known: Times measured earlier, such as those of a costs.json.
    """

    def __init__(self, known: Iterable[RoundCost] = ()) -> None:
        self.check, self.draft = Meter(CHECK_SHARES), Meter(DRAFT_SHARES)
        for cost in known:
            self.check.know((1, cost.requests, cost.rows), cost.check_ms)
            if cost.passes:
                self.draft.know((1, cost.passes, cost.draft_rows), cost.draft_ms)
        for meter in (self.check, self.draft):
            if meter.times:
                meter.fit()
        self._assume()

    def saw(self, cost: RoundCost) -> None:
        """Add a measured round."""
        if cost.check_ms > 0:
            self.check.saw((1, cost.requests, cost.rows), cost.check_ms)
        self._assume()
        if cost.passes and cost.draft_ms > 0:
            self.draft.saw((1, cost.passes, cost.draft_rows), cost.draft_ms)

    def _assume(self) -> None:
        """Until drafting is measured, set its cost relative to that of the target's pass."""
        if not self.draft.times:
            self.draft.costs = self.check.costs.sum() / sum(CHECK_SHARES) * self.draft.shares

    def draft_ms(self, passes: int, draft_rows: int) -> float:
        """Predict the time in ms of drafting. Arguments are those of `RoundCost`."""
        return self.draft((1, passes, draft_rows)) if passes else 0.0

    def round_ms(self, requests: int, rows: int, passes: int, draft_rows: int) -> float:
        """Predict the time in ms of a round: drafting and check. Arguments are those of `RoundCost`."""
        return self.check((1, requests, rows)) + self.draft_ms(passes, draft_rows)

    @property
    def row_ms(self) -> tuple[float, float]:
        """Fitted time in ms of one more row of the target, and of one more row of the draft."""
        return float(self.check.costs[2]), float(self.draft.costs[2])
