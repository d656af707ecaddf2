"""Plot the speed-up over the target alone by number of requests: `python -m experiments.batch.plot`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.gpu_pair.plot import GREY, INK

HERE = Path(__file__).parent
SHAPE, TOKENS, CHANCE = "qwen2_5_vl_32b_7b", "16384", 0.8
LOOKS = {
    (0.9, "bf16"): ("#0b6e99", "90 % dropped"),
    (0.0, "bf16"): ("#d1495b", "nothing dropped"),
    (0.9, "fp8"): ("#2e8b57", "90 % dropped, draft in fp8"),
}


def best(rows: Sequence[dict[str, Any]], ratio: float, draft: str, layers: float = 1.0) -> dict[int, float]:
    """Return the speed-up of the best tree by number of requests, with so much of the layers."""
    found: dict[int, float] = {}
    for row in rows:
        setting = row["shape"], row["video_tokens"], row.get("chance", CHANCE), row.get("layers", 1.0), row.get("stagger", 0)
        wanted = row["part"] == "speculative" and setting == (SHAPE, TOKENS, CHANCE, layers, 0)
        if wanted and (row["ratio"], row["draft_weights"]) == (ratio, draft):
            found[row["requests"]] = max(found.get(row["requests"], 0.0), row["against_alone"])
    return dict(sorted(found.items()))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the best tree of each setting. Hollow marks: half the layers of both models."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": GREY, "text.color": INK}
    fig, axes = pyplot.subplots(figsize=(6.4, 4), dpi=160)
    counts, row = set[int](), rows[-1]
    for (ratio, draft), (colour, label) in LOOKS.items():
        looks = {"color": colour, "markersize": 5, "linewidth": 1.8, "marker": "o"}
        whole, half = best(rows, ratio, draft), best(rows, ratio, draft, 0.5)
        axes.plot([*whole], [*whole.values()], label=label, **looks)
        axes.plot([*half], [*half.values()], linestyle="none", **(looks | {"markerfacecolor": "white"}))
        counts |= {*whole, *half}
    fig.text(0.01, 0.955, "Speed-up over as many requests by the target alone", fontsize=11, fontweight="bold")
    note = f"{SHAPE} on {row['machine']}, {TOKENS} video tokens, {row['weights']}; best tree of each setting."
    fig.text(0.01, 0.915, note, fontsize=7, color=GREY)
    told = f"Acceptance given: each best guess right with probability {CHANCE}. Hollow: half the layers of both models."
    fig.text(0.01, 0.885, told, fontsize=7, color=GREY)
    axes.set(xlabel="requests at once", ylabel="times as many tokens per second", ylim=(1, None))
    axes.set_xticks(sorted(counts))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")
    fig.subplots_adjust(top=0.85, left=0.1, right=0.98, bottom=0.13)
    fig.savefig(path)
    pyplot.close(fig)


if __name__ == "__main__":
    draw([json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()], HERE / "speedup.png")
