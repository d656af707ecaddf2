"""Rows as tables: means over scenes with their intervals (see specvlm.report.statistics), differences scene by scene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.ablations.findings import findings
from experiments.ablations.presets import BASES, bases_of, planned
from experiments.ablations.rows import ROOT, Results, read
from experiments.strategies.report import TITLES, filled
from specvlm.report.reading import Row
from specvlm.report.statistics import Interval, gained, interval
from specvlm.report.table import TWO_DIGITS, signed

NOT_RUN = "*not run*"
Table = list[list[str]]  # the heads first


def bounded(found: Interval, show: Callable[[float], str] = TWO_DIGITS) -> str:
    between = "" if found.low is None or found.high is None else f" [{show(found.low)}, {show(found.high)}]"
    return f"{show(found.value)}{between}"


def acceptance(experiment: str, results: Results, family: str) -> Table:
    """A line a job that was run; a difference is bold where its interval leaves 0 out."""
    headings = list(dict.fromkeys(heading for job in planned(experiment, family) for heading in bases_of(experiment, job)))
    lines = [["job", "scenes", "kept", "accepted per round", *(f"less `{heading}`" for heading in headings)]]
    for job in planned(experiment, family):
        if found := interval(results.accepted(family, job.label)):
            rows = results.of(family, job.label)
            kept, video = (np.mean([row[key] for row in rows if row["kept"] is not None]) for key in ("kept", "video"))
            cells = [f"`{job.label}`", str(len(rows)), f"{kept:.0f} of {video:.0f}", bounded(found)]
            for base in bases_of(experiment, job).values():
                gap = interval(results.accepted(family, job.label, base), gained) if base else None
                text = bounded(gap, signed) if gap else ""
                cells.append(f"**{text}**" if gap and gap.sure else text)
            lines.append(cells)
    return lines


def speed(experiment: str, results: Results, family: str) -> Table:
    """Times as fast as the target alone, sums over scenes; of rows of one machine."""
    lines = [["job", "scenes", "decode", "end to end", "engine"]]
    for job in planned(experiment, family):
        rows = [row for row in results.of(family, job.label) if row["decode"][1] is not None]
        if rows:
            cells = []
            for what in ("decode", "end_to_end"):
                ours, alone = np.array([row[what] for row in rows], dtype=np.float64).T
                found = interval([alone, ours])
                cells.append(bounded(found).replace(" [", " × [", 1) if found else "")
            engines = ", ".join(sorted({row["engine"] for row in rows}))
            lines.append([f"`{job.label}`", str(len(rows)), *cells, engines])
    return lines


def verdicts(experiment: str, results: Results, family: str) -> str:
    """How many answers were proved to be the target's own."""
    rows = [row for job in planned(experiment, family) for row in results.of(family, job.label)]
    counts = Counter(row["verdict"].partition(" at token")[0] for row in rows)
    engines = Counter(row["engine"] for row in rows)
    proved, ran = (", ".join(f"{count} {kind}" for kind, count in some.most_common()) for some in (counts, engines))
    return f"{len(rows)} answers: {proved}; engine: {ran}."


def made_by(source: Row) -> str:
    each = [f"torch {one['torch']}, transformers {one['transformers']}" for one in source["versions"]]
    return f"{source['machine'] or ''}; {'; '.join(dict.fromkeys(each))}".removeprefix("; ")


def judged(results: Results, attention: Sequence[Row]) -> Table:
    lines = [["", "finding of the paper", "pair", "measured", "figure", "scenes", "verdict"]]
    for found in findings(results, attention):
        figure = bounded(found.figure, found.show) if found.figure else NOT_RUN
        scenes = str(found.figure.count) if found.figure else ""
        cells = [found.name, found.claim, TITLES[found.family], found.measured, figure, scenes, f"**{found.verdict}**"]
        lines.append(cells)
    return lines


def markdown(table: Table) -> Iterator[str]:
    heads, *lines = table
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    yield from (f"| {' | '.join(cells)} |" for cells in lines)


def aligned(table: Table) -> Iterator[str]:
    """For a terminal."""
    bare = [[cell.translate({ord(mark): None for mark in "*`"}) for cell in cells] for cells in table]
    widths = [max(map(len, column)) for column in zip(*bare, strict=True)]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in bare)


def section(experiment: str, results: Results, kind: str) -> Iterator[str]:
    """All that stands between the markers of a README: a table a pair. kind: acceptance or speed."""
    if not results.families:
        yield NOT_RUN
    for family in results.families:
        yield f"### {TITLES[family]}{'' if kind == 'acceptance' else ', speed'}\n"
        yield from markdown((acceptance if kind == "acceptance" else speed)(experiment, results, family))
        words = [verdicts(experiment, results, family)] if kind == "acceptance" else []
        yield f"\n{' '.join([*words, made_by(results.sources[family])])}\n"


def all_rows(root: Path = ROOT) -> Results:
    return Results(row for experiment in BASES for row in read(root / experiment / "rows.jsonl"))


def readme(experiment: str, text: str, root: Path = ROOT) -> str:
    """The text with its tables made anew from the committed rows."""
    if experiment == "findings":
        table = judged(all_rows(root), read(root / "findings" / "attention.jsonl"))
        return filled(text, "findings", markdown(table))
    for kind, name in (("acceptance", "rows"), ("speed", "speed")):
        results = Results(read(root / experiment / f"{name}.jsonl"))
        text = filled(text, kind, section(experiment, results, kind))
    return text
