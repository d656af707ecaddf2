"""Turn rows into README.md's table: `python -m experiments.exactness report`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.strategies.report import filled

PAGE, ROWS = (Path(__file__).with_name(name) for name in ("README.md", "results.jsonl"))
Row = dict[str, Any]
WAYS = {"ours": "path attention", "mask": "masked flash decoding", "sdpa": "Hugging Face, SDPA"}
OF = {"ours": "captured engine", "control": "Hugging Face's modules, as a control"}


def agreed(rows: Sequence[Row]) -> bool:
    """Whether everything equals plain decoding that is exact by construction."""
    nodes = all(row["bits"] == row["nodes"] for row in rows if row["part"] == "nodes" and row["way"] == "ours")
    decodes = all(row["first"] is None for row in rows if row["part"] == "decodes" and row["by"] == "ours")
    return nodes and decodes and not any(row["different"] for row in rows if row["part"] == "answers")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table: what was compared, by what, how much of it is equal, where."""
    yield "| what | arithmetic | equal to plain decoding | |"
    yield "|---|---|---|---|"
    for part, lines in (("nodes", _nodes), ("decodes", _decodes), ("answers", _answers)):
        yield from lines([row for row in rows if row["part"] == part])


def _groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def _place(rows: Sequence[Row]) -> str:
    """Name the dtype, machine and commits of rows."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['dtype']}, {rows[0]['machine']}, {commits}"


def _nodes(rows: Sequence[Row]) -> Iterator[str]:
    for (shape, way), mine in _groups(rows, "shape", "way").items():
        nodes, bits, best = (sum(row.get(key, 0) for row in mine) for key in ("nodes", "bits", "argmax, random head"))
        trees = sum(row["trees"] for row in mine)
        what = f"{shape}: nodes of {trees} random trees at up to {mine[0]['slots']:,} slots, logits and all keys and values"
        yield f"| {what} | {WAYS[way]} | {bits:,} of {nodes:,}; best token of a random head {best:,} | {_place(mine)} |"


def _decodes(rows: Sequence[Row]) -> Iterator[str]:
    for (shape, parallel, by, tokens), mine in _groups(rows, "shape", "parallel", "by", "tokens").items():
        same = sum(row["first"] is None for row in mine)
        mean = sum(row["accepted"] for row in mine) / max(1, sum(row["rounds"] for row in mine))
        spread = f" over two GPUs ({parallel})" if parallel else ""
        what = f"{shape}{spread}: answers of {tokens} tokens, {mean:.1f} guesses accepted a round"
        yield f"| {what} | {OF[by]} | {same} of {len(mine)} | {_place(mine)} |"


def _answers(rows: Sequence[Row]) -> Iterator[str]:
    for (family, source), mine in _groups(rows, "family", "source").items():
        decodes, wrong = sum(row["decodes"] for row in mine), sum(len(row["different"]) for row in mine)
        drafters = len({name.partition(" ")[0] for row in mine for name in row["accepted"]})
        sums = [pair for row in mine for pair in row["accepted"].values()]
        mean = sum(accepted for accepted, _ in sums) / max(1, sum(rounds for _, rounds in sums))
        what = f"embedded {family}: {len(mine)} videos ({source}), {drafters} drafters, `greedy` and `coupled`"
        what += f", {mean:.1f} guesses accepted a round"
        yield f"| {what} | {OF['ours']} | {decodes - wrong:,} of {decodes:,} | {_place(mine)} |"


def write() -> int:
    """Write README.md's table from the committed rows. Returns 1 if something is not equal that should be."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    PAGE.write_text(filled(PAGE.read_text(), "exactness", table(rows)))
    return 0 if agreed(rows) else 1
