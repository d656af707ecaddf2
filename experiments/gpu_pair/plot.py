"""Plot ms per token over context and ratio, with the bandwidth floor: `python -m experiments.gpu_pair.plot [FILE]`.

FILE defaults to results.jsonl in this folder. Writes SHAPE_context.png and SHAPE_ratio.png beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from experiments.gpu_pair.report import Row, latest, read

INK, GREY = "#222222", "#8a8a8a"
COLOURS = ("#0b6e99", "#d1495b", "#2e8b57", "#b07d12", "#7b4fa3", "#c2185b", "#5d6d7e", "#00838f", "#a0522d", "#6b8e23")


def figure(title: str, rows: Sequence[Row]) -> tuple[Any, Any]:
    """Create a figure with title and caption. Returns figure and axes."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": GREY, "text.color": INK}
    fig, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=160)
    fig.text(0.01, 0.955, title, fontsize=11, fontweight="bold")
    row, commits = rows[-1], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    note = f"{row['machine']}, {row['weights']}, at a given acceptance. Dashed: bandwidth floor. Commit {commits}."
    fig.text(0.01, 0.915, note, fontsize=min(7.5, 960 / len(note)), color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel("ms per token")
    return fig, axes


def line(axes: Any, xs: Sequence[Any], ys: Sequence[float], floors: Sequence[float | None], label: str, colour: str) -> None:
    """Draw a series, and its floor dashed if all rows have one."""
    axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.8, color=colour, label=label)
    if all(floor is not None and floor == floor for floor in floors):
        axes.plot(xs, floors, linestyle=(0, (4, 3)), linewidth=1.1, color=colour, alpha=0.75)


def finish(fig: Any, axes: Any, path: Path) -> None:
    """Set ticks and legend, and save."""
    from matplotlib import pyplot

    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        ticks = [m * 10**e for e in range(4) for m in (1, 2, 5) if low <= m * 10**e <= high]
        axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.tight_layout(rect=(0, 0, 1, 0.92))
    fig.savefig(path)
    pyplot.close(fig)


def floor_of(row: Row) -> float:
    """Return the bandwidth floor of a row, in ms per token."""
    return row["floor_ms"] / (1 + row.get("accepted_found", 0.0))


def by_context(rows: Sequence[Row], path: Path, ratio: float, accepted: float) -> None:
    """Plot Hugging Face, our autoregressive loop, and rounds at one ratio and acceptance per draft storage type."""
    fig, axes = figure(f"{rows[0]['shape']}: ms per token against context", rows)
    series: dict[str, list[Row]] = {}
    for row in rows:
        form = f"{row['parallel']}: " if row.get("parallel") else ""
        if row["part"] == "hf":
            series.setdefault("Hugging Face generate", []).append(row)
        elif row["part"] == "autoregressive":
            known = series.setdefault(f"{form}our autoregressive", [])
            known += [row] if row["video_tokens"] not in [other["video_tokens"] for other in known] else []
        elif row["part"] == "rounds" and (row["ratio"], row["accepted"]) == (ratio, accepted):
            draft = f"{row['draft_weights']} {'shared ' if row.get('draft_parallel') else ''}draft"
            series.setdefault(f"{form}{accepted:g} accepted, {draft}", []).append(row)
    for colour, (label, mine) in zip(cycle(COLOURS), series.items(), strict=False):
        mine = sorted(mine, key=lambda row: row["video_tokens"])
        floors = [floor_of(row) if "floor_ms" in row else None for row in mine]
        line(axes, [row["video_tokens"] for row in mine], [row["ms_per_token"] for row in mine], floors, label, colour)
    contexts = sorted({row["video_tokens"] for row in rows if "video_tokens" in row})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")  # an eager loop takes ten times as long as the rest
    axes.set_xticks(contexts, [f"{n / 1024:.0f}k" if n >= 1024 else str(n) for n in contexts])
    axes.minorticks_off()
    axes.set_xlabel(f"video tokens; drafter at ratio {ratio:g}")
    finish(fig, axes, path)


def by_ratio(rows: Sequence[Row], path: Path, context: int, weights: str) -> None:
    """Plot one line per acceptance, and our autoregressive loop."""
    mine = [row for row in rows if row.get("video_tokens") == context and row.get("draft_weights") == weights]
    fig, axes = figure(f"{rows[0]['shape']}: ms per token against ratio, {context:,} video tokens, {weights} draft", rows)
    rounds = [row for row in mine if row["part"] == "rounds"]
    ratios = sorted({row["ratio"] for row in rounds})
    for row in (row for row in mine if row["part"] == "autoregressive"):
        line(axes, ratios, [row["ms_per_token"]] * len(ratios), [row["floor_ms"]] * len(ratios), "our autoregressive", INK)
    for colour, accepted in zip(cycle(COLOURS), sorted({row["accepted"] for row in rounds}), strict=False):
        found = sorted((row for row in rounds if row["accepted"] == accepted), key=lambda row: row["ratio"])
        xs, ys = [row["ratio"] for row in found], [row["ms_per_token"] for row in found]
        line(axes, xs, ys, [floor_of(row) for row in found], f"{accepted:g} accepted", colour)
    axes.set_xticks(ratios)
    axes.set_xlabel("ratio: share of the video tokens that the drafter does not see")
    finish(fig, axes, path)


def main(path: Path) -> None:
    """Plot each shape and machine of a results file."""
    rows = latest(read(path))
    for shape, machine in dict.fromkeys((row["shape"], row["machine"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["machine"]) == (shape, machine)]
        rounds = [row for row in mine if row["part"] == "rounds"]
        if not rounds:
            continue
        if any(row["engine"] == "graphs" for row in rounds):
            mine, rounds = ([row for row in some if row.get("engine") != "eager"] for some in (mine, rounds))
        accepted = min((row["accepted"] for row in rounds), key=lambda a: abs(a - 4))
        ratio = min((row["ratio"] for row in rounds), key=lambda r: abs(r - 0.9))
        context = min((row["video_tokens"] for row in rounds), key=lambda n: abs(n - 16384))
        several = any(row.get("parallel") for row in rounds)
        by_context(mine, path.with_name(f"{shape}{'_parallel' if several else ''}_context.png"), ratio, accepted)
        if not several:
            by_ratio(mine, path.with_name(f"{shape}_ratio.png"), context, rounds[0]["draft_weights"])
        print(f"{shape} on {machine}: drawn")


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.jsonl"
    if not file.is_file():
        sys.exit(f"{file}: no such file; python -m experiments.gpu_pair writes it")
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ModuleNotFoundError:
        sys.exit("the plots need matplotlib: pip install 'specvlm[bench]'")
    main(file)
