"""Make the tables of README.md from outcomes.jsonl and results.jsonl: python -m experiments.overlap.report"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.ablations.tables import markdown
from experiments.overlap.record import SHAPES
from experiments.strategies.report import TITLES, filled

HERE = Path(__file__).parent


def read(name: str) -> list[dict[str, Any]]:
    """Read the rows of a file; none if there is no such file."""
    path = HERE / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def hits(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tabulate hits by the number of corrections per node: shares over all rounds of a setting."""
    lines = [["pair", "pruner", "tree", "scenes", "accepted", "hits, 1 correction", "2", "3", "4"]]
    for family, pruner, shape in dict.fromkeys((row["family"], row["pruner"], row["shape"]) for row in rows):
        mine = [row for row in rows if (row["family"], row["pruner"], row["shape"]) == (family, pruner, shape)]
        rounds = [one for row in mine for one in row["rounds"]]
        shares = [sum(0 <= rank < most for _, rank in rounds) / len(rounds) for most in (1, 2, 3, 4)]
        accepted = sum(accepted for accepted, _ in rounds) / len(rounds)
        title = {**TITLES, "qwen3_vl": "Qwen3-VL"}[family]
        cells = [f"{accepted:.2f}", *(f"{share:.2f}" if most <= SHAPES[shape] else "" for most, share in enumerate(shares, 1))]
        lines.append([title, f"`{pruner}`", f"`{shape}`", str(len(mine)), *cells])
    yield from markdown(lines)


def times(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tabulate rounds with the draft hidden."""
    heads = ["pair", "video tokens", "draft", "tree", "accepted", "hits", "round, ms", "floor", "ms a token"]
    lines = [[*heads, "over ours", "… not hidden", "prediction off by"]]
    for row in rows:
        if row["part"] != "with":
            continue
        pair = " ".join(filter(None, (row["shape"], row["target_weights"], row["parallel"])))
        figures = [f"{row[key]:.2f}" for key in ("mean_ms", "floor_ms", "ms_per_token")]
        more = [f"{row['against_ours']:.2f} ×", f"{row['against_ours'] / row['against_without']:.2f} ×"]
        found = [f"{row['accepted_found']:.2f}", "none" if row["hits_found"] is None else f"{row['hits_found']:.2f}"]
        names = [pair, f"{row['video_tokens']:,}", row["draft_weights"], f"`{row['tree']}`"]
        lines.append([*names, *found, *figures, *more, f"{row['predicted_error']:+.0%}"])
    if len(lines) > 1:
        yield from markdown(lines)


def main() -> None:
    page = HERE / "README.md"
    text = filled(page.read_text(encoding="utf-8"), "hits", hits(read("outcomes.jsonl")))
    page.write_text(filled(text, "times", times(read("results.jsonl"))), encoding="utf-8")


if __name__ == "__main__":
    main()
