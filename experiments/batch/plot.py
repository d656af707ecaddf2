"""Plot the speed-up over the target alone by number of requests: `python -m experiments.batch.plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.gpu_pair.plot import GREY, INK

HERE = Path(__file__).parent
LOOKS = {
    (0.9, "bf16"): ("#0b6e99", "90 % dropped"),
    (0.0, "bf16"): ("#d1495b", "nothing dropped"),
    (0.9, "fp8"): ("#2e8b57", "90 % dropped, draft in fp8"),
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the best tree of each setting."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": GREY, "text.color": INK}
    fig, axes = pyplot.subplots(figsize=(6.4, 4), dpi=160)
    for (ratio, draft), (colour, label) in LOOKS.items():
        best: dict[int, float] = {}
        for row in rows:
            if row["part"] == "speculative" and (row["ratio"], row["draft_weights"]) == (ratio, draft):
                best[row["requests"]] = max(best.get(row["requests"], 0.0), row["against_alone"])
        counts = sorted(best)
        axes.plot(counts, [best[count] for count in counts], marker="o", markersize=5, linewidth=1.8, color=colour, label=label)
    row = rows[-1]
    fig.text(0.01, 0.955, "Speed-up over as many requests by the target alone", fontsize=11, fontweight="bold")
    note = f"{row['shape']} on {row['machine']}, {row['video_tokens']} video tokens, {row['weights']}, commit {row['commit']}."
    fig.text(0.01, 0.915, note, fontsize=7, color=GREY)
    fig.text(0.01, 0.885, f"Acceptance {row['acceptance']}.", fontsize=7, color=GREY)
    axes.set(xlabel="requests at once", ylabel="times as many tokens per second", ylim=(1, None))
    axes.set_xticks(sorted({row["requests"] for row in rows}))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")
    fig.subplots_adjust(top=0.85, left=0.1, right=0.98, bottom=0.13)
    fig.savefig(path)


if __name__ == "__main__":
    draw([json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()], HERE / "speedup.png")
