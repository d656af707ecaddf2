"""The charts of a report as one picture, SVG or PDF, in the page's light colours."""

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

import altair
import vl_convert

from specvlm.report.reading import Job
from specvlm.report.table import groups

WIDTH, MARGIN, HEAD = 560, 24, 34  # pixels: of a plot without its axes, around charts, and of a heading
COLUMN_GAP = 30  # pixels between columns of a legend, where a wider font may go
# Fonts of the same widths, since texts are measured here and drawn elsewhere.
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"


def svg_of(jobs: Sequence[Job], title: str, base: str | None = None) -> str:
    """Draw all charts below each other. base: name of the job to compare with, see `bases`."""
    parts, top, wide = [heading(title, MARGIN, 20)], 2.0 * HEAD, 0.0
    made = [(group.title, chart) for group in groups(jobs, base) for chart in group.charts]
    several = len({name for name, _ in made}) > 1
    for number, (name, chart) in enumerate(made):
        drawn, width, height = chart_of(chart.spec, f"c{number}-")
        parts.append(heading(f"{chart.title} ({name})" if several else chart.title, top, 15))
        parts.append(f'<g transform="translate({MARGIN} {top + MARGIN})">{drawn}</g>')
        top, wide = top + HEAD + MARGIN + height, max(wide, width)
    size = f'width="{wide + 2 * MARGIN:.0f}" height="{top:.0f}"'
    paper = f'<rect width="100%" height="100%" fill="{colours()["--card"]}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{paper}{"".join(parts)}</svg>\n'


def pdf_of(jobs: Sequence[Job], title: str, base: str | None = None) -> bytes:
    """Draw the charts as one page of PDF."""
    drawn: bytes = vl_convert.svg_to_pdf(svg_of(jobs, title, base))
    return drawn


def heading(text: str, top: float, size: int) -> str:
    """Draw a heading at the height `top`."""
    look = f'font-family="{FONT}" font-size="{size}" font-weight="600" fill="{colours()["--ink"]}"'
    return f'<text x="{MARGIN}" y="{top + size / 2:.0f}" {look}>{escape(text)}</text>'


def chart_of(spec: dict[str, Any], prefix: str) -> tuple[str, float, float]:
    """Draw one chart. prefix: makes its ids unique in the picture. Returns the SVG element, its width and height."""
    plain = coloured({key: value for key, value in spec.items() if key != "autosize"} | {"width": WIDTH})
    look = plain.get("config", {})
    plain["config"] = look | {"font": FONT, "legend": look.get("legend", {}) | {"columnPadding": COLUMN_GAP}}
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    drawn: str = vl_convert.vegalite_to_svg(plain, vl_version=version)
    drawn = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}", drawn)
    drawn = drawn.replace("<svg ", '<svg overflow="visible" ', 1)  # a wider font uses the margin; no label is cut
    width, height = (float(value) for value in re.findall(r' (?:width|height)="([\d.]+)"', drawn[: drawn.index(">")])[:2])
    return drawn, width, height


def coloured(part: Any) -> Any:
    """Replace the page's CSS variables in a specification with their light colours. Texts of data are not touched."""
    if isinstance(part, dict):
        return {key: value if key == "values" else coloured(value) for key, value in part.items()}
    if isinstance(part, list):
        return [coloured(value) for value in part]
    found = re.fullmatch(r"var\((--\w+)\)", part) if isinstance(part, str) else None
    return colours()[found[1]] if found else part


@cache
def colours() -> dict[str, str]:
    """Light colours of the page by the name of their CSS variable."""
    style = (files("specvlm.results") / "page" / "look.css").read_text(encoding="utf-8")
    return dict(re.findall(r"(--\w+): (#\w+);", style[: style.index("@media")]))
