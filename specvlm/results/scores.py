"""Totals of the scores that metrics give: means with intervals, by task, and against the target's own answers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DRAWS, SEED = 2000, 0  # resamples and seed of the bootstrap
Z = 1.959964  # quantile of the standard normal distribution for a 95 % interval
MOST_GROUPS = 32  # maximum number of values of a key of `meta` that scores are grouped by
Row = Mapping[str, Any]

SCORES = {
    "mean": "mean score over the `scored` samples",
    "low": "lower end of its 95 % interval: Wilson's if all scores are 0 or 1, else a bootstrap's over samples. null for fewer "
    "than two samples",
    "high": "upper end of that interval",
    "scored": "number of samples with a score",
    "unscored": "number of samples without a score: their right answer is unknown, or the metric's rule leaves them out",
    "baseline": "mean score of the target's own answers, over the samples where both are scored; null without baselines",
    "gain": "mean, over these samples, of our score minus that of the target's own answer, as `mean`, `low` and `high`, from a "
    "bootstrap paired by sample; null without baselines. Below 0, a lossy rule costs that much",
    "by": "for each key of `meta` with few values, such as task: `mean`, `low`, `high` and `scored` by value",
    "mean_by": "for each of these keys the mean over its values, each counted once, such as MLVU's M-Avg by task",
}


def totals_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Compute the totals of every metric, by its name; SCORES explains them. Leaves out metrics without any score.

    Args:
        rows: Rows of a job that are ok.
    """
    names = dict.fromkeys(name for row in rows for name in row.get("scores") or {})
    found = {name: total_of(rows, name) for name in names}
    return {name: total for name, total in found.items() if total["scored"]}


def total_of(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Compute the totals of one metric; SCORES explains them."""
    scored = [row for row in rows if score(row, name) is not None]
    both = [(score(row, name), score(row, name, "baseline_scores")) for row in scored if row.get("baseline_token_ids")]
    pairs = [(ours, alone) for ours, alone in both if ours is not None and alone is not None]
    by = {key: by_group(scored, name, key) for key in group_keys(scored)}
    return {
        **mean_of([value for row in scored if (value := score(row, name)) is not None]),
        "unscored": len(rows) - len(scored),
        "baseline": sum(alone for _, alone in pairs) / len(pairs) if pairs else None,
        "gain": paired([ours - alone for ours, alone in pairs]) if pairs else None,
        "by": by,
        "mean_by": {key: sum(group["mean"] for group in groups.values()) / len(groups) for key, groups in by.items()},
    }


def score(row: Row, name: str, key: str = "scores") -> float | None:
    """Return a score of a row; None if there is none. key: "scores" or "baseline_scores"."""
    return (row.get(key) or {}).get(name)


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Return `mean`, `low`, `high` and `scored` of a list of scores, as SCORES explains them."""
    if not values:
        return {"mean": None, "low": None, "high": None, "scored": 0}
    binary = set(values) <= {0.0, 1.0}
    low, high = (wilson if binary else bootstrapped)(values) if len(values) > 1 else (None, None)
    return {"mean": sum(values) / len(values), "low": low, "high": high, "scored": len(values)}


def paired(values: Sequence[float]) -> dict[str, Any]:
    """Return `mean`, `low` and `high` of the differences between two scores of each sample."""
    low, high = bootstrapped(values) if len(values) > 1 else (None, None)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def wilson(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927). It has a width even if all values are equal."""
    count, share = len(values), sum(values) / len(values)
    scale = 1 + Z * Z / count
    middle, half = share + Z * Z / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrapped(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean: the percentiles of DRAWS resamples, with a fixed seed."""
    known, chance = np.asarray(values, dtype=np.float64), np.random.default_rng(SEED)
    means = [known[chance.integers(len(known), size=(20, len(known)))].mean(1) for _ in range(DRAWS // 20)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def group_keys(rows: Sequence[Row]) -> list[str]:
    """Find the keys of `meta` to group by.

    Every row has the key. Its values are texts or integers, at least 2 and at most MOST_GROUPS different ones, and each
    has at least two rows on average.
    """
    values = defaultdict[str, list[Any]](list)
    for row in rows:
        for key, value in (row.get("meta") or {}).items():
            values[key].append(value)
    return [key for key, found in values.items() if len(found) == len(rows) and few(found)]


def few(values: Sequence[Any]) -> bool:
    """Whether these values of a key are suitable to group by, see `group_keys`."""
    if not all(isinstance(value, str | int) for value in values):
        return False
    count = len(set(values))
    return 1 < count <= MOST_GROUPS and 2 * count <= len(values)


def by_group(rows: Sequence[Row], name: str, key: str) -> dict[str, dict[str, Any]]:
    """Return the mean score of each group, in the order of the samples, with its interval."""
    groups = defaultdict[str, list[float]](list)
    for row in rows:
        if (value := score(row, name)) is not None:
            groups[str(row["meta"][key])].append(value)
    return {group: mean_of(values) for group, values in groups.items()}


def differing(rows: Sequence[Row]) -> dict[str, int] | None:
    """Count lossy answers that differ from the target's own: `differ` out of `compared`. None if none is compared."""
    lossy = [row for row in rows if row["verdict"] == "lossy" and row.get("baseline_token_ids") is not None]
    if not lossy:
        return None
    return {"differ": sum(row["token_ids"] != row["baseline_token_ids"] for row in lossy), "compared": len(lossy)}
