"""Bootstrap intervals (95 %) of a job's metrics and of their differences from another job's, paired by sample.

Resamples samples, not rounds, since rounds of one answer are correlated. Pairing removes the variation between easy
and hard samples (percentile bootstrap; Efron and Tibshirani, 1993, ch. 13). The metrics are those of
`metrics.totals`: means over samples, and speed-ups as quotients of two sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from specvlm.errors import UserError, did_you_mean
from specvlm.report.reading import APART, Job
from specvlm.results import scores
from specvlm.results.metrics import SPANS

DRAWS, SEED = 2000, 0  # resamples and seed of the bootstrap
FEWEST = 6  # minimum number of samples for a significant difference: 2 / 2**6 < 0.05
SCORE, GAIN = "score:", "gain:"  # prefixes of a metric's name: keys of its score, and of its gain over the target alone
QUOTIENTS = {f"speedup_{what}": (f"baseline_{what}_s", f"{what}_s") for what in SPANS}
Columns = Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over `count` samples. low, high: None for fewer than two samples."""

    value: float
    low: float | None
    high: float | None
    count: int

    @property
    def sure(self) -> int:
        """1 or -1 if the whole interval is above or below zero, else 0.

        0 for fewer than FEWEST samples: their differences all have the same sign by chance in more than 5 of 100 cases,
        and then every resample has it too.
        """
        if self.low is None or self.high is None or self.count < FEWEST:
            return 0
        return (self.low > 0) - (self.high < 0)


def total(*columns: NDArray[np.float64], axis: int = -1) -> Any:
    """Mean of one column, or quotient of the sums of two."""
    if len(columns) == 1:
        return np.mean(columns[0], axis=axis)
    return np.sum(columns[0], axis=axis) / np.sum(columns[1], axis=axis)


def gained(*columns: NDArray[np.float64], axis: int = -1) -> Any:
    """`total` of the first half of the columns minus that of the second."""
    half = len(columns) // 2
    return total(*columns[:half], axis=axis) - total(*columns[half:], axis=axis)


def interval(columns: Columns, statistic: Any = total) -> Interval | None:
    """Bootstrap a statistic of columns with one entry per sample. Returns None if they are empty. The seed is fixed."""
    count = len(columns[0])
    if not count:
        return None
    value = float(statistic(*columns))
    if count < 2:
        return Interval(value, None, None, count)
    draw = partial(bootstrap, n_resamples=DRAWS, method="percentile", paired=True, vectorized=True)
    found = draw(tuple(columns), statistic, rng=np.random.default_rng(SEED)).confidence_interval
    return Interval(value, float(found.low), float(found.high), count)


def mean_of(values: Sequence[float]) -> Interval | None:
    """Mean of the values with its interval; None if there are none."""
    return interval([np.asarray(values, dtype=np.float64)])


def by_sample(job: Job, key: str) -> dict[str, tuple[float, ...]]:
    """Collect by sample the one or two values from which a metric is computed; skips samples that lack the metric."""
    if key.startswith((SCORE, GAIN)):
        return {row["sample"]: (value,) for row in job.done if (value := scored(row, key)) is not None}
    parts = QUOTIENTS.get(key, (key,))
    return {row["sample"]: tuple(float(row[part]) for part in parts) for row in job.done if row.get(key) is not None}


def scored(row: Mapping[str, Any], key: str) -> float | None:
    """Return a row's score or gain; None if it has none. key: SCORE or GAIN, then the metric's name."""
    kind, _, metric = key.partition(":")
    ours, alone = scores.score(row, metric), scores.score(row, metric, "baseline_scores")
    if kind == "score" or ours is None:
        return ours
    return None if alone is None else ours - alone


def metrics_of(jobs: Sequence[Job]) -> list[str]:
    """Names of the metrics that scored any of these jobs."""
    return list(dict.fromkeys(metric for job in jobs for metric in job.totals["scores"]))


def total_of(job: Job, key: str) -> float | None:
    """The job's total of a key of `metrics.TOTALS`, or of a score or a gain; None if no sample has it."""
    if not key.startswith((SCORE, GAIN)):
        value: float | None = job.totals[key]
        return value
    kind, _, metric = key.partition(":")
    found = job.totals["scores"].get(metric) or {}
    known: float | None = found.get("mean") if kind == "score" else (found.get("gain") or {}).get("mean")
    return known


@cache
def figure(job: Job, key: str) -> Interval | None:
    """The job's total of `key` with its interval; None if no sample has it."""
    if key.startswith(SCORE):
        found = job.totals["scores"].get(key.removeprefix(SCORE))
        return found and Interval(found["mean"], found["low"], found["high"], found["scored"])
    found = interval(columns_of(list(by_sample(job, key).values())))
    value = total_of(job, key)
    return None if found is None or value is None else replace(found, value=value)


def difference(job: Job, base: Job, key: str) -> Interval | None:
    """A metric of `job` minus that of `base`, over the samples that both have; None if there are none."""
    mine, other = by_sample(job, key), by_sample(base, key)
    return interval(columns_of([(*value, *other[sample]) for sample, value in mine.items() if sample in other]), gained)


def columns_of(table: Sequence[tuple[float, ...]]) -> Columns:
    """Transpose rows of values into columns; a table without rows becomes one empty column."""
    return list(np.asarray(table, dtype=np.float64).T) if table else [np.empty(0)]


def bases(jobs: Sequence[Job], name: str | None) -> dict[Job, Job | None]:
    """Choose the job to compare each job with.

    Args:
        jobs: All jobs.
        name: Label, series or folder of the base; if several match, the one with the job's ratio, else the first.
            None: the job with pruner=uniform and otherwise the same settings and ratio. If no job has one, the first
            job.

    Returns:
        The base of each job; None if there is none or it would be the job itself.

    Raises:
        UserError: No job has that name.
    """
    if name is not None:
        some = called(name, jobs)
        found = {job: next((other for other in some if other.ratio == job.ratio), some[0]) for job in jobs}
    else:
        found = {job: base for job in jobs if (base := uniform_like(job, jobs))} or dict.fromkeys(jobs, jobs[0])
    return {job: None if found.get(job) is job else found.get(job) for job in jobs}


def uniform_like(job: Job, jobs: Sequence[Job]) -> Job | None:
    """Find a job that used pruner=uniform and differs from `job` in nothing else (`apart_from_pruner`), or None."""
    uniform = (other for other in jobs if other.ratio is not None and other.settings.get("pruner.name") == "uniform")
    return next((other for other in uniform if apart_from_pruner(other, job)), None)


def called(name: str, jobs: Sequence[Job]) -> list[Job]:
    """Find the jobs with this label, series, or folder (its name or whole path). Raises UserError if there are none."""
    found = [job for job in jobs if name in (job.label, job.series, job.folder.name, str(job.folder))]
    if not found:
        names = [job.label for job in jobs]
        raise UserError(f"no job is called {name!r}; choose from {'; '.join(names)}.{did_you_mean(name, names)}")
    return found


def apart_from_pruner(one: Job, other: Job) -> bool:
    """Whether two jobs have the same ratio and settings, not counting the pruner and the keys in APART."""
    mine, others = (
        {k: v for k, v in job.settings.items() if k not in APART and not k.startswith("pruner.")} for job in (one, other)
    )
    return mine == others and one.ratio == other.ratio


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto front of (cost, gain) points, by rising cost.

    A point is left out if another one costs no more and gains at least as much. Of equal points, one is kept.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, found = -float("inf"), []
    for place in order:
        if points[place][1] > best:
            best = points[place][1]
            found.append(place)
    return found
