"""Make the charts of a report, as Vega-Lite specifications.

Uses Altair, whose whole script adds 0.9 MB to the file (Plotly: 4.6 MB). The charts are SVG and take their colours from
the page's CSS variables, so they suit light and dark mode. Unlike pictures they have tooltips and selectable series,
on a phone too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import altair as alt

from specvlm.report.labels import TITLE_LINE, job_axis, legend
from specvlm.report.reading import Job
from specvlm.report.statistics import figure, front
from specvlm.results.metrics import DRAFTER_START, FIRST_TOKEN

COLOURS = [f"var(--c{number})" for number in range(12)]  # of series and parts: CSS variables of the page
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]
PARTS = (*FIRST_TOKEN, *DRAFTER_START, "draft", "verify")
HEIGHT, MANY = 260, 5  # height of a chart in pixels; most series whose bands are all shown
BAR = 18  # pixels of a bar, also where a job's name takes several lines
QUIET = {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "titleFontWeight": 400}
LOOKS = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": QUIET | {"gridColor": "var(--line)", "domainColor": "var(--line)", "tickColor": "var(--line)"},
    "legend": QUIET | {"orient": "bottom", "title": None, "symbolSize": 60, "rowPadding": 3},
}
REFERENCE = {"color": "var(--muted)", "strokeDash": [5, 4]}
SERIES = "series:N"


SEPARATORS = {0x2028: " ", 0x2029: " "}  # Unicode's line and paragraph separators, and what replaces them


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: Identifies the chart in its report.
        title: Heading.
        note: What the chart shows, in a sentence or two.
        spec: Vega-Lite specification, data included.
    """

    name: str
    title: str
    note: str
    spec: dict[str, Any]


def charts(jobs: Sequence[Job]) -> list[Chart]:
    """Make every chart that the jobs have data for."""
    alone = "times as fast as the target alone"
    several = len({job.ratio for job in jobs if job.ratio}) > 1  # not counting ratio 0
    figures = against_ratio if several else by_job
    against, spread = ", against the share of the video tokens dropped", "Lines: 95 % intervals over samples."
    if several:
        spread = "Bands: 95 % intervals of the mean over samples; with many series, only for the one selected in the legend."
    drawn = [
        (
            "accepted",
            "Accepted per round",
            f"Guesses accepted per round, without the bonus token{against if several else ''}. {spread}",
            figures(jobs, "accepted_per_round", "accepted per round"),
        ),
        (
            "decode",
            "Speed of decoding",
            "Without both prefills. Below the dashed line speculation does not pay.",
            figures(jobs, "speedup_decode", alone, 1.0),
        ),
        (
            "end_to_end",
            "Speed end to end",
            "With both prefills, the pruner and the drafter's vision tower, but without reading the video.",
            figures(jobs, "speedup_end_to_end", alone, 1.0),
        ),
        (
            "pareto",
            "Pareto front",
            "Cost and yield of a round. The line joins the jobs that no other job beats in both. Above the dashed line "
            "decoding is faster than the target alone.",
            pareto(jobs),
        ),
        (
            "depth",
            "Acceptance by depth",
            "Share of rounds that accepted at least this many guesses in a row, mean over samples.",
            depth(jobs),
        ),
        (
            "times",
            "Where the time goes",
            "Seconds per sample by part, without reading the video. The tick marks the target alone, end to end.",
            split(jobs),
        ),
    ]
    return [Chart(name, title, note, finished(chart)) for name, title, note, chart in drawn if chart is not None]


def finished(chart: alt.LayerChart | alt.Chart) -> dict[str, Any]:
    """Return the specification of a chart, made as wide as its container and in the page's style."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return without_separators(chart.properties(width="container", autosize=fit).configure(**LOOKS).to_dict())


def without_separators(part: Any) -> Any:
    """Replace SEPARATORS in all texts of a specification: Vega cannot parse an expression with one in a string."""
    if isinstance(part, dict):
        return {without_separators(key): without_separators(value) for key, value in part.items()}
    if isinstance(part, list):
        return [without_separators(value) for value in part]
    return part.translate(SEPARATORS) if isinstance(part, str) else part


def chart_of(rows: list[dict[str, Any]], **properties: Any) -> alt.Chart:
    """Start a chart with these rows of data in its specification."""
    return alt.Chart(alt.InlineData(values=rows), **properties)


def looks_of(jobs: Sequence[Job]) -> tuple[alt.Color, alt.Shape, alt.Parameter]:
    """Return colour and shape of each series, the same in all charts of these jobs, and the selection in the legend."""
    names = list(dict.fromkeys(job.series for job in jobs))
    ranges = ([all_of[i % len(all_of)] for i in range(len(names))] for all_of in (COLOURS, SHAPES))
    colours, shapes = (alt.Scale(domain=names, range=some) for some in ranges)
    chosen = alt.selection_point(fields=["series"], bind="legend", name="chosen")
    told = legend(names)
    return alt.Color(SERIES, scale=colours, legend=told), alt.Shape(SERIES, scale=shapes, legend=told), chosen


def figures_of(jobs: Sequence[Job], key: str) -> list[dict[str, Any]]:
    """Make one row of data for each job that has the metric `key`, with the value and its interval."""
    return [
        {"job": job.label, "series": job.series, "ratio": job.ratio, "samples": found.count}
        | {"value": found.value, "low": found.low, "high": found.high}
        for job in jobs
        if (found := figure(job, key)) is not None
    ]


def by_job(jobs: Sequence[Job], key: str, title: str, reference: float | None = None) -> alt.LayerChart | None:
    """Draw one line per job with the point and interval of `key`, highest first; for jobs that share one ratio.

    The axis names the jobs. There is no legend, since long names on the axis leave no room for one.

    reference: where to draw a dashed line. Returns None if no job has the metric.
    """
    rows = sorted(figures_of(jobs, key), key=lambda row: -row["value"])
    if not rows:
        return None
    colour, shape = (look.legend(None) for look in looks_of(jobs)[:2])
    axis, height = job_axis([row["job"] for row in rows])
    base = chart_of(rows, height=height).encode(
        y=alt.Y("job:N", title=None, sort=[row["job"] for row in rows], axis=axis),
        color=colour,
        tooltip=[alt.Tooltip(f"{name}:{kind}", format=form) for name, kind, form in TIPS],
    )
    named = wrap(title, TITLE_LINE)
    x = alt.X("value:Q", title=named, scale=alt.Scale(zero=False, padding=12))
    layers = [base.mark_point(filled=True, size=70).encode(x=x, shape=shape)]
    if any(row["low"] is not None for row in rows):
        layers.insert(0, base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=named), x2="high:Q"))
    if reference is not None:
        layers.append(chart_of([{"value": reference}]).mark_rule(**REFERENCE).encode(x=x))
    return alt.layer(*layers)


def against_ratio(jobs: Sequence[Job], key: str, title: str, reference: float | None = None) -> alt.LayerChart | None:
    """Draw `key` against the ratio: one curve per series with its band; jobs without a ratio are horizontal lines.

    reference: where to draw a dashed line. Returns None if no job has the metric.
    """
    rows = figures_of(jobs, key)
    pruned = [row for row in rows if row["ratio"] is not None]
    if not rows:
        return None
    colour, shape, chosen = looks_of(jobs)
    ratios = sorted({job.ratio for job in jobs if job.ratio is not None})
    axis = alt.Axis(values=ratios, format=".3~p", grid=False)
    x = alt.X("ratio:Q", title="dropped", axis=axis, scale=alt.Scale(zero=False, padding=12))
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    shown = alt.condition(chosen, alt.value(1), alt.value(0.12))
    tips = [alt.Tooltip(f"{name}:{kind}", format=form) for name, kind, form in TIPS]
    base = chart_of(pruned, height=HEIGHT).encode(x=x, color=colour, opacity=shown)
    faint = 0.07 if len({row["series"] for row in pruned}) <= MANY else 0.0  # many bands would merge into one grey area
    wide = alt.condition(alt.param(name="chosen"), alt.value(0.2), alt.value(faint), empty=False)
    band = base.mark_area().encode(y="low:Q", y2="high:Q", fillOpacity=wide)
    line = base.mark_line(strokeWidth=2).encode(y=y)
    points = base.mark_point(filled=True, size=55).encode(y=y, shape=shape, tooltip=tips).add_params(chosen)
    layers: list[alt.Chart] = [line, points] if pruned else []
    if any(row["low"] is not None for row in pruned):
        layers.insert(0, band)
    level = [row for row in rows if row["ratio"] is None]
    if level:
        flat = chart_of(level, height=HEIGHT).mark_rule(strokeWidth=2).encode(y=y, color=colour, tooltip=tips)
        layers.append(flat if pruned else flat.add_params(chosen))
    if reference is not None:
        layers.append(chart_of([{"value": reference}]).mark_rule(**REFERENCE).encode(y=y))
    return alt.layer(*layers)


TIPS = [("job", "N", ""), ("value", "Q", ".3f"), ("low", "Q", ".3f"), ("high", "Q", ".3f"), ("samples", "Q", "d")]


def pareto(jobs: Sequence[Job]) -> alt.LayerChart | None:
    """Plot tokens against milliseconds per round, with the Pareto front and a line for the target's own speed.

    Returns None if no job has drafted.
    """
    rows: list[dict[str, Any]] = []
    for job in jobs:
        known, gain = job.totals, job.totals["tokens_per_round"]
        if known["rounds"] and gain and known["decode_s"] is not None:
            cost = 1000 * known["decode_s"] / known["rounds"]
            share = "" if job.ratio is None else f"{100 * job.ratio:g} %"
            figures = {"cost": cost, "gain": gain, "each": cost / gain}
            rows.append({"job": job.label, "series": job.series, "dropped": share} | figures)
    if not rows:
        return None
    best = front([(row["cost"], row["gain"]) for row in rows])
    colour, shape, chosen = looks_of(jobs)
    costs, gains = ([row[name] for row in rows] for name in ("cost", "gain"))
    left, right = min(costs) * 0.94, max(costs) * 1.06
    x = alt.X(
        "cost:Q", title="milliseconds per round", scale=alt.Scale(domain=[left, right], nice=False), axis=alt.Axis(grid=False)
    )
    bounds = [min(gains) - 0.3, max(gains) + 0.3]
    y = alt.Y("gain:Q", title="tokens per round", scale=alt.Scale(domain=bounds, nice=False))
    tips = [alt.Tooltip("job:N"), alt.Tooltip("cost:Q", title="ms per round", format=".2f")]
    tips += [
        alt.Tooltip("gain:Q", title="tokens per round", format=".2f"),
        alt.Tooltip("each:Q", title="ms per token", format=".2f"),
    ]
    shown = alt.condition(chosen, alt.value(1), alt.value(0.15))
    points = chart_of(rows, height=HEIGHT).mark_point(filled=True, size=70)
    points = points.encode(x=x, y=y, color=colour, shape=shape, opacity=shown, tooltip=tips).add_params(chosen)
    joined = chart_of([rows[place] for place in best]).encode(x=x, y=y)
    line = joined.mark_line(color="var(--ink)", strokeWidth=1.2)
    names = joined.mark_text(align="left", dx=8, dy=9, fontSize=11, color="var(--ink)").encode(text="dropped:N")
    layers = [line, points, names]
    alone = [(row["baseline_decode_s"], row["new_tokens"] - 1) for job in jobs for row in job.done if row["baseline_decode_s"]]
    if alone:
        each = 1000 * sum(seconds for seconds, _ in alone) / sum(tokens for _, tokens in alone)
        ends = [{"cost": cost, "gain": cost / each} for cost in (left, right)]
        layers.insert(0, chart_of(ends).mark_line(clip=True, **REFERENCE).encode(x=x, y=y))
    return alt.layer(*layers)


def depth(jobs: Sequence[Job]) -> alt.LayerChart | alt.Chart | None:
    """Draw the acceptance by depth, one curve per series. With several ratios, a menu below the chart selects one.

    Returns None if no job has drafted.
    """
    rows = [
        {"job": job.label, "series": job.series, "dropped": job.drops, "depth": place, "share": share}
        for job in jobs
        for place, share in enumerate(job.totals["acceptance_by_depth"], start=1)
    ]
    if not rows:
        return None
    colour, shape, chosen = looks_of(jobs)
    drops = {job.drops: job.ratio or 0.0 for job in jobs if job.ratio is not None}
    base = chart_of(rows, height=HEIGHT).encode(
        x=alt.X("depth:O", title="guesses in a row", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("share:Q", title="share of rounds", axis=alt.Axis(format=".0%"), scale=alt.Scale(domain=[0, 1])),
        color=colour,
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.12)),
    )
    if len(drops) > 1:
        names = sorted(drops, key=lambda name: drops[name])
        usual = min(names, key=lambda name: abs(drops[name] - 0.9))
        select = alt.param(name="at", value=usual, bind=alt.binding_select(options=names, name="the drafter's view: "))
        base = base.add_params(select).transform_filter("datum.dropped == at || datum.dropped == ''")
    tips = [alt.Tooltip("job:N"), alt.Tooltip("depth:O"), alt.Tooltip("share:Q", format=".1%")]
    points = base.mark_point(filled=True, size=55).encode(shape=shape, tooltip=tips).add_params(chosen)
    return alt.layer(base.mark_line(strokeWidth=2), points)


def split(jobs: Sequence[Job]) -> alt.LayerChart | None:
    """Draw one stacked bar per job of the mean seconds by part, with a tick for the target alone, end to end.

    Returns None if no job has times.
    """
    rows = [
        {"job": job.label, "part": part.replace("_", " "), "order": PARTS.index(part), "seconds": seconds}
        for job in jobs
        for part, seconds in job.totals["times_s"].items()
        if part in PARTS
    ]
    if not rows:
        return None
    names = [job.label for job in jobs]
    axis, height = job_axis(names)
    y = alt.Y("job:N", title=None, sort=names, axis=axis)
    parts = [part.replace("_", " ") for part in PARTS if part.replace("_", " ") in {row["part"] for row in rows}]
    bars = chart_of(rows, height=height).mark_bar(size=BAR)
    bars = bars.encode(
        x=alt.X("seconds:Q", title="seconds", stack="zero"),
        y=y,
        color=alt.Color("part:N", scale=alt.Scale(domain=parts, range=COLOURS[: len(parts)]), legend=legend(parts)),
        order="order:Q",
        tooltip=[alt.Tooltip("job:N"), alt.Tooltip("part:N"), alt.Tooltip("seconds:Q", format=".4f")],
    )
    alone = [(job.label, job.totals["baseline_end_to_end_s"]) for job in jobs]
    ends = [{"job": label, "seconds": seconds} for label, seconds in alone if seconds is not None]
    tick = chart_of(ends).mark_tick(color="var(--ink)", thickness=2, size=BAR).encode(x="seconds:Q", y=y)
    return alt.layer(bars, tick) if ends else alt.layer(bars)
