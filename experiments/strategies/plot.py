"""The pruners drawn: `python -m experiments.strategies.plot` writes accepted.png and difference.png beside results/.

accepted.png: accepted per round against ratio, a field a pruner, `uniform` dashed in each. difference.png: what a pruner
accepts more than `uniform` at ratio 0.9, with its 95 % interval.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from experiments.embedded_pair.evaluate import FAMILIES
from experiments.gpu_pair.plot import GREY, INK
from experiments.strategies.report import TITLES, UNIFORM, Results, accepted, load, order, verdict
from experiments.strategies.settings import HERE, RATIO, RATIOS, TREE, Setting

COLOURS = dict(zip(FAMILIES, ("#0b6e99", "#d1495b"), strict=True))
COLUMNS = 6


def note(results: dict[str, Results]) -> str:
    scenes = max(len(found.scenes) for found in results.values())
    return f"Embedded pairs, draft plain, the paper's tree, {scenes} held-out captions."


def curves(results: dict[str, Results], path: Path) -> None:
    from matplotlib import pyplot

    names = [name for name in order(results) if name != UNIFORM]
    rows = -(-len(names) // COLUMNS)
    fig, fields = pyplot.subplots(rows, COLUMNS, figsize=(13, 1.75 * rows + 1), dpi=150, sharex=True, sharey=True)
    for axes, name in zip(fields.flat, names, strict=False):
        for family, found in results.items():
            line(axes, found, UNIFORM, color=COLOURS[family], linewidth=1.0, linestyle=(0, (3, 2)), alpha=0.65)
            line(axes, found, name, color=COLOURS[family], linewidth=1.8, marker="o", markersize=3)
        axes.set_title(wrapped(name), fontsize=8, loc="left", color=INK, pad=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#ececec", linewidth=0.8)
        axes.tick_params(labelsize=7)
        axes.set_xticks(range(len(RATIOS)), [f"{ratio:g}" for ratio in RATIOS])
        axes.set_ylim(0, 5)
    for axes in fields.flat[len(names) :]:
        axes.set_visible(False)
    for axes in fields.flat[max(0, len(names) - COLUMNS) : len(names)]:
        axes.tick_params(labelbottom=True)
    handles = [pyplot.Line2D([], [], color=COLOURS[family], linewidth=1.8, label=TITLES[family]) for family in results]
    handles.append(pyplot.Line2D([], [], color=GREY, linestyle=(0, (3, 2)), label="uniform"))
    fig.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9)
    title(
        fig,
        "Accepted per round (of 5) against the share of video tokens dropped",
        note(results) + " Best pruners first; dashed: uniform.",
    )
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.55 / (1.75 * rows + 1)))
    fig.savefig(path)
    pyplot.close(fig)


def line(axes: Any, found: Results, name: str, **look: Any) -> None:
    """Ratios at equal distances: three of the four lie close together."""
    axes.plot(range(len(RATIOS)), [found.mean(Setting(TREE, name, ratio), accepted) for ratio in RATIOS], **look)


def wrapped(name: str) -> str:
    head, _, rest = name.partition(" ")
    return f"{head}\n{rest}"


def title(fig: Any, said: str, below: str) -> None:
    height = fig.get_size_inches()[1]
    fig.text(0.008, 1 - 0.24 / height, said, fontsize=12, fontweight="bold", color=INK)
    fig.text(0.008, 1 - 0.44 / height, below, fontsize=8, color=GREY)


def differences(results: dict[str, Results], path: Path) -> None:
    from matplotlib import pyplot

    names = [name for name in order(results) if name != UNIFORM][::-1]
    fig, fields = pyplot.subplots(1, len(results), figsize=(11, 0.24 * len(names) + 1.4), dpi=150, sharey=True, sharex=True)
    for axes, (family, found) in zip(fields, results.items(), strict=True):
        for place, name in enumerate(names):
            gap = found.against_uniform(name)
            if gap is None:
                continue
            mean, low, high = gap
            colour = {"better": COLOURS[family], "worse": COLOURS[family], "no different": GREY}[verdict(low, high)]
            axes.plot([low, high], [place, place], color=colour, linewidth=1.6, alpha=0.8)
            filled = colour if verdict(low, high) == "better" else "white"
            axes.plot([mean], [place], marker="o", markersize=5, color=colour, markerfacecolor=filled)
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_title(TITLES[family], fontsize=10, loc="left", color=COLOURS[family], fontweight="bold")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="both", color="#ececec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_xlabel("accepted per round, less uniform's", fontsize=8)
    said = f"Accepted per round, less what uniform accepts, {100 * RATIO:g} % of the video tokens dropped"
    title(fig, said, note(results) + " 95 % intervals over scenes. Filled: better; hollow: worse; grey: no different.")
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.5 / fig.get_size_inches()[1]))
    fig.savefig(path)
    pyplot.close(fig)


if __name__ == "__main__":
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ModuleNotFoundError:
        sys.exit("the plots need matplotlib: pip install 'specvlm[bench]'")
    if not (rows := load()):
        sys.exit("results/ has no rows; python -m experiments.strategies.evaluate makes them")
    curves(rows, HERE / "accepted.png")
    differences(rows, HERE / "difference.png")
