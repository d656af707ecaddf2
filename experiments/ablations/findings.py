"""The paper's findings as hypotheses, and what the rows say of each: supported, refuted, or not decided.

A verdict comes from a figure's 95 % interval over scenes alone, with limits that were set before the rows were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.ablations.rows import Results
from specvlm.report.reading import Row
from specvlm.report.statistics import Interval, gained, interval, mean_of
from specvlm.report.table import signed

TOP, HALF, SHARE, MARGIN = "0.1", 0.5, 0.9, 0.05
SUPPORTED, REFUTED, OPEN, NOT_RUN = "supported", "refuted", "not decided", "not run"


@dataclass(frozen=True)
class Finding:
    """figure: what was measured, None where the rows are missing."""

    name: str
    claim: str
    measured: str
    family: str
    figure: Interval | None
    verdict: str
    show: Callable[[float], str] = signed


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def above(found: Interval | None, limit: float) -> str:
    """Of the claim that it is at least the limit: the whole interval must lie on one side."""
    if found is None:
        return NOT_RUN
    if found.low is None or found.high is None:
        return OPEN
    return SUPPORTED if found.low > limit else REFUTED if found.high < limit else OPEN


def harmless(found: Interval | None, margin: float) -> str:
    """Of the claim that nothing is lost: refuted by an interval below 0; supported by one with 0 in it that also leaves out a
    loss of `margin`, since an interval that is wide shows nothing.
    """
    if found is None:
        return NOT_RUN
    if found.low is None or found.high is None:
        return OPEN
    return REFUTED if found.high < 0 else SUPPORTED if found.low > -margin else OPEN


def findings(results: Results, attention: Sequence[Row]) -> Iterator[Finding]:
    """Of every pair that has rows."""
    for family in results.families:
        claim = "random pruning of up to half of the video costs no significant acceptance"
        for label in ("random 0.25", "random 0.5"):
            columns = results.accepted(family, label, "none")
            found = interval(columns, gained)
            word = harmless(found, MARGIN * float(np.mean(columns[1])) if found else 0.0)
            yield Finding("H1", claim, f"accepted, `{label}` less `none`", family, found, word)
        tops = [row["top"][TOP] for row in attention if row["family"] == family]
        claim, said = "a tenth of the video tokens has more than half of the target's attention", "attention of the top 10 %"
        found = mean_of(tops)
        yield Finding("H2", claim, said, family, found, above(found, HALF), percent)
        claim = "two_stage at 0.9 keeps at least 90 % of the acceptance of the full video"
        for label in ("two_stage 0.9", "two_stage 0.9 mass=0.2"):
            found = interval(results.accepted(family, label, "none"))
            yield Finding("H3", claim, f"accepted, `{label}` over `none`", family, found, above(found, SHARE), percent)
        claim = "the first round accepts more than the average round"
        for label in ("none", "two_stage 0.9"):
            rows = [row["accepted"] for row in results.of(family, label) if row["accepted"]]
            found = mean_of([accepted[0] - float(np.mean(accepted)) for accepted in rows])
            yield Finding("H4", claim, f"`{label}`, first round less the mean", family, found, above(found, 0.0))
