"""Write the tables of results.jsonl: `python -m experiments.batch.report`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.batch.cells import missing

HERE = Path(__file__).parent
HEAD = (
    "requests",
    "tree",
    "ratio",
    "draft",
    "round, ms",
    "floor, ms",
    "tokens/s",
    "ms a token",
    "over the target alone",
    "GiB",
)
ABOUT = ("shape", "machine", "commit", "date", "video_tokens", "draft_weights", "acceptance", "layers", "stagger")


def cells(row: dict[str, Any]) -> list[str]:
    """Write a row's figures."""
    if row["part"] == "out_of_memory":
        return [str(row["requests"]), "out of memory", *["–"] * (len(HEAD) - 2)]
    own = row["part"] == "speculative"
    return [
        str(row["requests"]),
        tree(row) if own else "Hugging Face" if row["part"] == "hugging_face" else "–",
        f"{row['ratio']:g}" if own else "–",
        row["draft_weights"] if own else "–",
        f"{row['round_ms']:.1f}",
        f"{row['floor_ms']:.1f}" if "floor_ms" in row else "–",
        f"{row['tokens_per_s']:.0f}",
        f"{row['ms_per_token']:.2f}",
        f"{row['against_alone']:.2f} ×" if own else "1" if row["part"] == "alone" else "–",
        f"{row['peak_gib']:.1f}",
    ]


def tree(row: dict[str, Any]) -> str:
    """Name the tree; of `auto` also the mean number of guesses."""
    if row["tree"] != "auto":
        return str(row["tree"])
    counts = {int(guesses): often for guesses, often in row["guesses"].items()}
    mean = sum(guesses * often for guesses, often in counts.items()) / sum(counts.values())
    return f"auto ({mean:.1f})"


def title(row: dict[str, Any]) -> list[str]:
    """Say what a run's rows have in common."""
    scaled = f", {row['layers']:g} of the layers of both models" if row.get("layers", 1) != 1 else ""
    staggered = f", a request every {row['stagger']} rounds" if row.get("stagger") else ""
    what = f"{row['shape']} on {row['machine']}, {row['date'][:10]}, {row['video_tokens']} video tokens{scaled}{staggered}"
    how = f"Commit {row['commit']}; {row['weights']}; acceptance {row['acceptance']}. Copies run at {row['gb_per_s']} GB/s."
    return ["", f"## {what}", "", how, "", f"| {' | '.join(HEAD)} |", "|" + "---:|" * len(HEAD)]


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Write all rows as Markdown, a table for each run."""
    parts, last = ["# Results", "", "Tables written by `python -m experiments.batch.report` from results.jsonl.", ""], None
    for row in rows:
        about = tuple(str(row.get(name, "")) for name in ABOUT)
        if about != last:
            parts += title(row)
        last = about
        parts.append(f"| {' | '.join(cells(row))} |")
    left = missing([row.get("cell", "") for row in rows])
    parts += ["", f"Cells not run: {', '.join(f'`{name}`' for name in left) or 'none'}."]
    return "\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    found = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    (HERE / "RESULTS.md").write_text(text(found))
    sys.exit(0)
