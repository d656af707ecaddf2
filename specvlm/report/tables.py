"""The summary tables of a report as text: CSV for programs, Markdown for pages, LaTeX for papers."""

import csv
import io
import re
from collections.abc import Sequence

from specvlm.errors import visible
from specvlm.report.reading import Job
from specvlm.report.statistics import GAIN, Interval, bases, difference, figure, total_of
from specvlm.report.table import Cell, Group, Line, columns_of, groups

# Characters that LaTeX reads as commands or sets wrongly, and what to write for them.
LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "×": r"$\times$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "[": "{[}",  # a bracket after a line break would be its argument
    "]": "{]}",
}
FOREIGN = re.compile("[^\u0000-\u024f\u2010-\u2026]")  # characters that pdfLaTeX does not set
NOTE = "Intervals in brackets: 95 %"


def csv_of(jobs: Sequence[Job], base: str | None = None) -> str:
    """Make one CSV row per job, with plain numbers: totals, ends of intervals, and differences from the base job.

    base: name of the job to compare with, see `bases`.
    """
    columns, rows, against = columns_of(jobs), list[dict[str, object]](), dict[Job, Job | None]()
    for some in ([job for job in jobs if not job.lossy], [job for job in jobs if job.lossy]):
        against |= bases(some, base) if some else {}
    for job in jobs:
        other = against[job]
        row: dict[str, object] = {"job": job.label, "series": job.series, "ratio": job.ratio, "samples": len(job.done)}
        row |= {"lossy": job.lossy, "compared_with": other.label if other else None}
        for column in columns:
            row[column.key] = total_of(job, column.key)
            if column.compared:
                beside = difference(job, other, column.key) if other and not column.key.startswith(GAIN) else None
                row |= ends(column.key, figure(job, column.key), beside)
        rows.append(row | {f"verdict:{name}": count for name, count in job.totals["verdicts"].items()})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: formula_free(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def ends(key: str, found: Interval | None, other: Interval | None) -> dict[str, object]:
    """Return cells by name: ends of a figure's interval (`found`) and its difference from the base job (`other`)."""
    told: dict[str, object] = {f"{key}_low": found.low if found else None, f"{key}_high": found.high if found else None}
    if other is not None:
        told |= {f"{key}_difference": other.value}
        told |= {f"{key}_difference_low": other.low, f"{key}_difference_high": other.high}
    return told


def formula_free(value: object) -> object:
    """Put an apostrophe before a text that a spreadsheet would run as a formula: names come from untrusted files."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def markdown_of(jobs: Sequence[Job], title: str, base: str | None = None) -> str:
    """Make the summary tables as GitHub Markdown."""
    parts = [f"# {marked(title)}"]
    for group in groups(jobs, base):
        heads = [marked(f"{column.title} {column.unit}".strip()) for column in group.columns]
        lines = [[marked(text) for text in texts(line)] for line in group.lines]
        rule = ["---"] + ["---:"] * (len(heads) - 2) + ["---"]
        parts += [f"## {marked(group.title)}", marked(group.verdict)]
        parts += ["\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *lines)), marked(group.note)]
    return "\n\n".join(filter(None, parts)) + "\n"


def latex_of(jobs: Sequence[Job], title: str, base: str | None = None) -> str:
    """Make the summary tables as LaTeX, for the package booktabs. Differences from the base job are left out."""
    made = [tabular(group) for group in groups(jobs, base)]
    parts = [f"% {one_line(title)}: needs \\usepackage{{booktabs}}"]
    if foreign := sorted(set(FOREIGN.findall("".join(made)))):
        parts[0] += f"\n% LuaLaTeX or XeLaTeX, with a font that has {''.join(foreign)}"
    return "\n\n".join([*parts, *made]) + "\n"


def tabular(group: Group) -> str:
    """Make one table as LaTeX: figures with their intervals below them, in small print."""
    shown = [column for column in group.columns if column.key not in ("job", "verdict")]
    heads = ["", *(escaped(column.title) for column in shown)]
    units = ["", *(small(column.unit) for column in shown)]
    lines = [f"% {one_line(group.title)}. {one_line(group.verdict)}", f"\\begin{{tabular}}{{l{'r' * len(shown)}}}", r"\toprule"]
    lines += [" & ".join(row) + r" \\" for row in (heads, units)] + [r"\midrule"]
    for line in group.lines:
        found = {cell.key: figure_of(cell) for cell in line.cells}
        lines.append(" & ".join([escaped(job_of(line)), *(escaped(found[column.key][0]) for column in shown)]) + r" \\")
        bounds = [found[column.key][1] for column in shown]
        if any(bounds):
            lines.append(" & ".join(["", *map(small, bounds)]) + r" \\")
    return "\n".join(
        [*lines, r"\bottomrule", rf"\multicolumn{{{len(heads)}}}{{l}}{{\scriptsize {escaped(NOTE)}}}", r"\end{tabular}"]
    )


def small(text: str) -> str:
    """Set a text in small print, as LaTeX; an empty text stays empty."""
    return f"{{\\scriptsize {escaped(text)}}}" if text else ""


def figure_of(cell: Cell) -> tuple[str, str]:
    """Return the texts of a cell's value and of its interval. The cell of a gain has both in `against`."""
    if cell.text:
        return cell.text, cell.bounds
    value, _, bounds = cell.against.partition(" ")
    return value, bounds


def job_of(line: Line) -> str:
    """Name of a line's job: its series and how much it drops."""
    return ", ".join([line.series, *line.view[:1]])


def texts(line: Line) -> list[str]:
    """Texts of a line's cells, the job's name first."""
    return [", ".join([line.series, *line.view]), *(whole(cell) for cell in line.cells)]


def whole(cell: Cell) -> str:
    """Text of a cell with its interval and its difference."""
    return " ".join(filter(None, (cell.text, cell.bounds, f"({cell.against})" if cell.against else "")))


def one_line(text: str) -> str:
    """Replace white space with single spaces, so that a name cannot end a comment or cell; drop control characters."""
    return " ".join(visible(text).split())


def marked(text: str) -> str:
    """Escape a text for Markdown: no name may end a cell, or become a link, a picture or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", one_line(text))


def escaped(text: str) -> str:
    """Escape a text for LaTeX."""
    return "".join(LATEX.get(sign, sign) for sign in one_line(text))
