"""Scores in a report: their columns in the summary table, and a table of scores by task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specvlm.report.reading import Job
from specvlm.report.statistics import GAIN, SCORE, metrics_of
from specvlm.results import scores


@dataclass(frozen=True)
class TaskCell:
    """A cell of a table by task. value: number to sort by, or None; bounds: its interval as text, or empty."""

    value: float | None
    text: str
    bounds: str = ""


@dataclass(frozen=True)
class TaskTable:
    """Scores of one metric by the values of a key of `meta`, such as task. heads: these values; lines: cells by job."""

    title: str
    heads: list[str]
    lines: list[tuple[Job, list[TaskCell]]]


def tables(jobs: Sequence[Job]) -> list[TaskTable]:
    """Make one table for each metric and each key of `meta` that scores are grouped by."""
    return [table(jobs, metric, key) for metric in metrics_of(jobs) for key in keys(jobs, metric)]


def keys(jobs: Sequence[Job], metric: str) -> list[str]:
    """Keys of `meta` that any job's scores are grouped by."""
    return list(dict.fromkeys(key for job in jobs for key in by_key(job, metric)))


def by_key(job: Job, metric: str) -> Mapping[str, Any]:
    """Scores of a job by key of `meta`; empty if it has none."""
    found: Mapping[str, Any] = job.totals["scores"].get(metric, {}).get("by", {})
    return found


def table(jobs: Sequence[Job], metric: str, key: str) -> TaskTable:
    """Make the table of one metric and one key."""
    groups = [by_key(job, metric).get(key, {}) for job in jobs]
    heads = list(dict.fromkeys(value for found in groups for value in found))
    lines = [(job, [cell(found.get(head)) for head in heads]) for job, found in zip(jobs, groups, strict=True)]
    return TaskTable(f"{metric} by {key}".replace("_", " "), heads, lines)


def cell(found: Mapping[str, Any] | None) -> TaskCell:
    """Make a cell from a mean and its interval."""
    if found is None or found["mean"] is None:
        return TaskCell(None, "–")
    bounds = [] if found["low"] is None else [f"[{found['low']:.3f}, {found['high']:.3f}]"]
    return TaskCell(found["mean"], f"{found['mean']:.3f}", ", ".join([*bounds, f"n = {found['scored']}"]))


def columns(jobs: Sequence[Job]) -> list[tuple[str, str, str]]:
    """Key, title and unit of each score's columns: the score and, under a lossy rule, its gain over the target's."""
    lossy = any(job.lossy for job in jobs)
    found = []
    for metric in metrics_of(jobs):
        title = metric.replace("_", " ")
        found.append((SCORE + metric, title, "score"))
        if lossy:
            found.append((GAIN + metric, f"{title} gained", "vs target alone"))
    return found


def differing(job: Job) -> str:
    """Say how many answers of a lossy job differ from the target's own, such as `3 of 8 differ`; else empty."""
    lossy = scores.differing(job.done)
    return f"{lossy['differ']} of {lossy['compared']} differ" if lossy else ""
