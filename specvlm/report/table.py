"""Make the summary tables: one line per job, with metrics, intervals, and differences from a base job."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from specvlm.app.console import seconds
from specvlm.report.charts import Chart, charts
from specvlm.report.reading import Job
from specvlm.report.statistics import FEWEST, GAIN, SCORE, Interval, bases, difference, figure, total_of
from specvlm.report.tasks import TaskTable, columns, differing, tables

FINE = ("identical", "numeric tie", "sampled")  # verdicts of a lossless answer


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: Key that `total_of` takes; "job" and "verdict" for the first and the last column.
        title: Heading.
        unit: Small text after the heading.
        show: Formats a value.
        compared: Whether its cells also have an interval, and the difference from the base job.
    """

    key: str
    title: str
    unit: str
    show: Callable[[float], str]
    compared: bool = False


TWO_DIGITS, TIMES_AS_FAST = "{:.2f}".format, "{:.2f} ×".format


def size(value: float) -> str:
    """Format bytes in GiB or MiB."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def signed(value: float, digits: int = 2) -> str:
    """Format a difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


COLUMNS = (
    Column("accepted_per_round", "accepted", "per round", TWO_DIGITS, True),
    Column("speedup_decode", "decode", "vs target alone", TIMES_AS_FAST, True),
    Column("speedup_end_to_end", "end to end", "vs target alone", TIMES_AS_FAST, True),
    Column("tokens_per_second", "tokens", "per second", "{:.0f}".format),
    Column("speedup_file_to_last_token", "file to last token", "vs target alone", TIMES_AS_FAST, True),
    Column("time_to_first_token_s", "first token", "", seconds),
    Column("file_to_first_token_s", "file to first token", "", seconds),
    Column("file_to_last_token_s", "file to last token", "", seconds),
    Column("reused_tokens", "reused", "prompt tokens", "{:.0f}".format),
    Column("peak_memory_bytes", "peak memory", "", size),
)


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        key: Key of its column.
        value: Number to sort by, or None.
        text: The value as text.
        bounds: Interval of the value as text, or empty.
        against: Difference from the base job as text, with its interval, or empty.
        side: "up" or "down" if the whole interval of the difference is above or below 0, else empty.
    """

    key: str
    value: float | None
    text: str
    bounds: str = ""
    against: str = ""
    side: str = ""


@dataclass(frozen=True)
class Line:
    """A line of the table. job: index among all jobs of the report; view: how much the drafter saw, from `view`."""

    job: int
    series: str
    view: list[str]
    cells: list[Cell]


@dataclass(frozen=True)
class Group:
    """A table of jobs that may be compared, with its charts.

    state: "bad" if a check found a wrong answer; "good" if all are the target's own or exactly sampled; else "open".
    """

    name: str
    title: str
    verdict: str
    state: str
    problems: list[str]
    columns: list[Column]
    lines: list[Line]
    note: str
    charts: list[Chart]
    tasks: list[TaskTable]


def groups(jobs: Sequence[Job], base: str | None = None) -> list[Group]:
    """Make one table of lossless and one of lossy jobs, which cannot be compared. base: see `bases`."""
    parts = {"lossless": [job for job in jobs if not job.lossy], "lossy": [job for job in jobs if job.lossy]}
    titles = {"lossless": "Summary", "lossy": "Lossy rules: not the target's own output"}
    return [group(name, titles[name], some, jobs, base) for name, some in parts.items() if some]


def group(name: str, title: str, jobs: Sequence[Job], every: Sequence[Job], base: str | None) -> Group:
    """Make the table of `jobs`. every: all jobs of the report, for their indices; base: see `bases`."""
    against = bases(jobs, base)
    columns = columns_of(jobs)
    lines = []
    for job, other in against.items():
        cells = [cell(job, other, column) for column in columns]
        found: Mapping[str, int] = job.totals["verdicts"]
        right = sum(found.get(kind, 0) for kind in FINE)
        told = ", ".join(filter(None, (counted(found), differing(job))))
        lines.append(Line(every.index(job), job.series, view(job), [*cells, Cell("verdict", right, told)]))
    heads = [Column("job", "job", "", TWO_DIGITS), *columns, Column("verdict", "output", "", TWO_DIGITS)]
    shown = charts(jobs), tables(jobs)
    return Group(name, title, *judged(jobs), problems(jobs), heads, lines, comparison_note(against), *shown)


def columns_of(jobs: Sequence[Job]) -> list[Column]:
    """Choose the columns that any of these jobs has a figure for: those of COLUMNS, and those of the metrics."""
    formats: dict[str, Callable[[float], str]] = {SCORE: "{:.3f}".format, GAIN: partial(signed, digits=3)}
    scored = [Column(key, title, unit, formats[key.partition(":")[0] + ":"], True) for key, title, unit in columns(jobs)]
    return [
        column for column in (*COLUMNS[:3], *scored, *COLUMNS[3:]) if any(total_of(job, column.key) is not None for job in jobs)
    ]


def cell(job: Job, base: Job | None, column: Column) -> Cell:
    """Make one cell of a job's line. base: the job to compare with, if any."""
    value = total_of(job, column.key)
    if value is None:
        return Cell(column.key, None, "–")
    if not column.compared:
        return Cell(column.key, value, column.show(value))
    found, other = figure(job, column.key), difference(job, base, column.key) if base else None
    digits, show = (3, "{:.3f}".format) if column.key.startswith(SCORE) else (2, TWO_DIGITS)
    if column.key.startswith(GAIN):  # a difference already, whose own interval says whether it is one
        side = {1: "up", -1: "down"}.get(found.sure, "") if found else ""
        return Cell(column.key, value, "", "", f"{column.show(value)} {bounds(found, column.show)}".strip(), side)
    sign = partial(signed, digits=digits)
    against = f"{sign(other.value)} {bounds(other, sign)}".strip() if other else ""
    side = {1: "up", -1: "down"}.get(other.sure, "") if other else ""
    return Cell(column.key, value, column.show(value), bounds(found, show), against, side)


def bounds(found: Interval | None, show: Callable[[float], str]) -> str:
    """Format an interval; empty if there is none."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"[{show(found.low)}, {show(found.high)}]"


def view(job: Job) -> list[str]:
    """Say how much of the video the drafter saw: `drops 90 %` and `keeps 102 of 1024` tokens, means over samples.

    Empty if no pruner was used.
    """
    known = [(row["kept_tokens"], row["video_tokens"]) for row in job.done if row["kept_tokens"] is not None]
    if not known:
        return []
    kept, total = (sum(column) / len(known) for column in zip(*known, strict=True))
    return [job.drops, f"keeps {kept:.0f} of {total:.0f}"]


def counted(verdicts: Mapping[str, int]) -> str:
    """Format counts by verdict, such as `3 identical, 1 numeric tie`."""
    return ", ".join(f"{count} {kind}" for kind, count in verdicts.items())


def judged(jobs: Sequence[Job]) -> tuple[str, str]:
    """Return the verdict on all answers of the jobs as a sentence, and its `Group.state`."""
    found = sum((Counter[str](job.totals["verdicts"]) for job in jobs), Counter[str]())
    total, text = sum(found.values()), counted(found)
    if wrong := found.get("MISMATCH", 0):
        return f"{wrong} of {total} answers are NOT the target's own ({text})", "bad"
    if wrong := sum(job.totals["hf_checks"].get("MISMATCH", 0) for job in jobs):
        return f"{wrong} of {total} answers are NOT those of Hugging Face's own model ({text})", "bad"
    if jobs[0].lossy:
        return f"{total} answers by a lossy rule", "open"
    if set(found) <= set(FINE):
        return f"lossless: all {total} answers are the target's own ({text})", "good"
    return f"{total} answers: {text}", "open"


def problems(jobs: Sequence[Job]) -> list[str]:
    """List one line for each mismatch, each sample that failed or was skipped, and each incomplete job."""
    lines = []
    for job in jobs:
        if job.summary.get("missing"):
            missing = f"{job.summary['missing']} of {job.summary['samples']} samples"
            lines.append(f"{job.label}: incomplete, {missing} are not done yet")
        for row in job.rows:
            said = [row["verdict"], row.get("hf_check") or ""] if row["status"] == "ok" else []
            wrong = [text for text in said if "MISMATCH" in text] if said else [row.get("reason") or row["status"]]
            lines += [f"{job.label}: {row['sample']}: {text}" for text in wrong]
    return lines


def comparison_note(against: Mapping[Job, Job | None]) -> str:
    """Explain which job the table's differences refer to; empty if no job has a base. against: base of each job."""
    others = {base for base in against.values() if base}
    if not others:
        return ""
    series, labels = {base.series for base in others}, sorted(base.label for base in others)
    what = labels[0] if len(labels) == 1 else f"{series.pop()} at the same ratio" if len(series) == 1 else "; ".join(labels)
    how = f"paired by sample, with its 95 % interval; coloured where it excludes 0, from {FEWEST} samples on."
    return f"Below each figure its difference to {what}, {how}"
