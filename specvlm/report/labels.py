"""Labels of legends and axes: long names are broken into lines instead of cut."""

import re
from collections.abc import Sequence
from typing import Any

import altair as alt

LEGEND_LINE, AXIS_LINE, TITLE_LINE = 40, 30, 20  # most characters of a line
NARROW, NARROWER = 19, 11  # longest names of a legend with two columns, and with three
LINE_HEIGHT, GAP = 14, 8  # pixels of a line of text, and between two jobs


def expression(most: int) -> str:
    """Vega expression that breaks `datum.label` into lines, between words where possible. Must agree with `lines`."""
    pattern = f"(.{{1,{most}}})(?: |$)|(.{{{most}}})"
    whole = "replace(datum.label, regexp(' %', 'g'), '\u00a0%')"  # "90 %" stays on one line
    return f"split(trim(replace({whole}, regexp('{pattern}', 'g'), '$1$2\\n')), '\\n')"


def lines(label: str, most: int) -> int:
    """Number of lines that `expression` breaks a label into."""
    pattern = f"(.{{1,{most}}})(?: |$)|(.{{{most}}})"
    return len(re.sub(pattern, "\\1\\2\n", label.replace(" %", "\u00a0%")).strip().split("\n"))


def legend(names: Sequence[str]) -> alt.Legend:
    """Make a legend in which no name is cut, with as many columns as the longest name allows."""
    longest = max(map(len, names), default=0)
    columns = 3 if longest <= NARROWER else 2 if longest <= NARROW else 1
    return alt.Legend(columns=columns, labelLimit=0, labelExpr=expression(LEGEND_LINE))


def job_axis(labels: Sequence[str]) -> tuple[alt.Axis, int]:
    """Make an axis with one job per line, in which no name is cut. Also returns the height that the chart needs."""
    most = max((lines(label, AXIS_LINE) for label in labels), default=1)
    axis: Any = alt.Axis(labelLimit=0, labelExpr=expression(AXIS_LINE), labelLineHeight=LINE_HEIGHT, grid=False)
    return axis, (LINE_HEIGHT * most + GAP) * len(labels)
