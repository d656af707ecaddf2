"""Write the tables of results.jsonl: `python -m experiments.batch.report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = ("requests", "tree", "ratio", "draft", "round, ms", "floor, ms", "tokens/s", "ms a token", "over the target alone")


def cells(row: dict[str, Any]) -> list[str]:
    """Write a row's figures."""
    alone = row["part"] == "alone"
    return [
        str(row["requests"]),
        "–" if alone else row["tree"],
        "–" if alone else f"{row['ratio']:g}",
        "–" if alone else row["draft_weights"],
        f"{row['round_ms']:.1f}",
        f"{row['floor_ms']:.1f}" if alone else "–",
        f"{row['tokens_per_s']:.0f}",
        f"{row['ms_per_token']:.2f}",
        "1" if alone else f"{row['against_alone']:.2f} ×",
    ]


def text(rows: list[dict[str, Any]]) -> str:
    """Write all rows as Markdown, a table for each run."""
    parts, last = ["# Results", "", "Tables written by `python -m experiments.batch.report` from results.jsonl.", ""], None
    for row in rows:
        about = tuple(str(row[name]) for name in ("shape", "machine", "commit", "date", "video_tokens", "draft_weights"))
        if about != last:
            shape, machine, commit, date, tokens, _ = about
            parts += ["", f"## {shape} on {machine}, {date[:10]}, {tokens} video tokens", ""]
            parts += [
                f"Commit {commit}; {row['weights']}; acceptance {row['acceptance']}. Copies run at {row['gb_per_s']} GB/s.",
                "",
            ]
            parts += [f"| {' | '.join(HEAD)} |", "|" + "---:|" * len(HEAD)]
        last = about
        parts.append(f"| {' | '.join(cells(row))} |")
    return "\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    found = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    (HERE / "RESULTS.md").write_text(text(found))
    sys.exit(0)
