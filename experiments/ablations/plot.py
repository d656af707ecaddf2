"""The ablations drawn, a PNG in each experiment's folder: accepted per round with its 95 % interval, a field a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablations.presets import BASES, FRAMES, Planned, planned
from experiments.ablations.rows import ROOT, Results
from experiments.gpu_pair.plot import COLOURS, GREY, INK
from experiments.strategies.report import TITLES
from specvlm.errors import UserError
from specvlm.report.reading import Row
from specvlm.report.statistics import interval

# Experiments with an axis: its setting, what it is called, and what tells the lines apart.
CURVES = {
    "ratio_by_pruner": ("ratio", "share of the video tokens dropped", "pruner.name"),
    "stage_one_mass": ("pruner.mass", "λ, the attention that stage I takes", "pruner.name"),
    "frames": ("frames", "frames", "pruner.name"),
}
TEXTS = {
    "main_table": "nine tenths of the video dropped by each rule",
    "ratio_by_pruner": "by the share dropped",
    "stage_one_mass": "by λ, at 90 % dropped",
    "positions": "by the rotary positions of what is kept",
    "tree_shapes": "by the shape of the tree, two_stage at 90 % dropped",
    "frames": "by the frames of the video",
}


def draw(results: Results, attention: Sequence[Row], root: Path = ROOT) -> None:
    """Of what has rows. Raises UserError without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("the plots need matplotlib: pip install 'specvlm[bench]'") from None
    matplotlib.use("Agg")
    for experiment in BASES:
        jobs = {family: [job for job in planned(experiment, family) if results.of(family, job.label)] for family in FRAMES}
        labels = list(dict.fromkeys(job.label for some in jobs.values() for job in some))
        if labels:
            height = 3.6 if experiment in CURVES else 0.27 * len(labels) + 1.5
            text = f"Accepted per round: {TEXTS[experiment]}"
            with fields(results.families, text, height, root / experiment / "accepted.png") as each:
                for family, axes in each.items():
                    if experiment in CURVES:
                        curves(axes, experiment, jobs[family], results, family)
                    else:
                        dots(axes, labels, results, family)
    if attention:
        with fields(results.families, "The target's attention to the video", 3.4, root / "findings" / "attention.png") as each:
            for family, axes in each.items():
                long_tail(axes, [row["top"] for row in attention if row["family"] == family])


@contextmanager
def fields(families: Sequence[str], text: str, height: float, path: Path) -> Iterator[dict[str, Any]]:
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.family": "DejaVu Sans", "font.size": 8, "axes.edgecolor": GREY, "text.color": INK}
    fig, some = pyplot.subplots(1, len(families), figsize=(9.6, height), dpi=130, sharex=True, sharey=True, squeeze=False)
    fig.text(0.008, 1 - 0.26 / height, text, fontsize=11, fontweight="bold")
    each = dict(zip(families, some[0], strict=True))
    for family, axes in each.items():
        axes.set_title(TITLES[family], fontsize=9, loc="left", color=GREY, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#ececec", linewidth=0.8)
        axes.set_axisbelow(True)
    yield each
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.34 / height))
    fig.savefig(path, metadata={"Software": None})
    pyplot.close(fig)


def dots(axes: Any, labels: Sequence[str], results: Results, family: str) -> None:
    for place, label in enumerate(reversed(labels)):
        if found := interval(results.accepted(family, label)):
            if found.low is not None:
                axes.plot([found.low, found.high], [place, place], color=COLOURS[0], linewidth=1.8, alpha=0.6)
            axes.plot([found.value], [place], marker="o", markersize=4.5, color=COLOURS[0])
    axes.set_yticks(range(len(labels)), labels[::-1])
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("accepted per round")


def curves(axes: Any, experiment: str, jobs: Sequence[Planned], results: Results, family: str) -> None:
    """Jobs where all or nothing is kept belong to every line of an axis of ratios."""
    key, name, series = CURVES[experiment]
    ends = [job for job in jobs if key == "ratio" and job.settings["ratio"] in (0, 1)]
    names = dict.fromkeys(job.settings[series] for job in jobs if job not in ends)
    for colour, one in zip(COLOURS, names, strict=False):
        mine = [job for job in jobs if job in ends or job.settings[series] == one]
        drawn = [(job.settings[key], interval(results.accepted(family, job.label))) for job in mine]
        points = {FRAMES[family] if x is None else x: found for x, found in drawn if found}
        xs = sorted(points)
        axes.plot(xs, [points[x].value for x in xs], marker="o", markersize=3.5, linewidth=1.7, color=colour, label=one)
        if all(points[x].low is not None for x in xs):
            bounds = [points[x].low for x in xs], [points[x].high for x in xs]
            axes.fill_between(xs, *bounds, color=colour, alpha=0.14, linewidth=0)
    axes.set_xlabel(name)
    axes.set_ylabel("accepted per round")
    axes.set_ylim(bottom=0)
    if len(names) > 1:
        axes.legend(frameon=False, loc="lower left")


def long_tail(axes: Any, tops: Sequence[dict[str, float]]) -> None:
    """The mass of the most attended tokens; a dashed line where all were attended alike."""
    if tops:
        shares = [0.0, *map(float, tops[0]), 1.0]
        mass = [0.0, *(float(np.mean([top[key] for top in tops])) for key in tops[0]), 1.0]
        axes.plot(shares, mass, marker="o", markersize=3.5, linewidth=1.7, color=COLOURS[0])
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (3, 2)), linewidth=1)
    axes.set_xlabel("share of the video tokens, the most attended first")
    axes.set_ylabel("share of the attention")
    axes.set_ylim(0, 1.02)
