"""Compare the adviser's prediction of rounds of several requests with measured ones: `python -m experiments.batch.predicted`.

Each number of requests is predicted from the others of its setting. A benchmark row has the time of a whole round, of which
that of as many requests by the target alone counts as its check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specvlm.advise.loads import prices_of, round_ms
from specvlm.types import TreeShape
from specvlm.types.costs import RoundCost

HERE = Path(__file__).parent
SETTING = ("shape", "machine", "commit", "video_tokens", "draft_weights", "layers", "stagger")
ROOT = TreeShape.from_paths([])


class Pair(NamedTuple):
    """A predicted and a measured round, in ms."""

    requests: int
    tree: str
    ratio: float | None
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def costs_of(rows: Sequence[dict[str, Any]]) -> list[RoundCost]:
    """Return what the rows of a setting say of rounds."""
    alone = {row["requests"]: row["round_ms"] for row in rows if row["part"] == "alone"}
    found = [RoundCost(count, count, 0, 0, 0.0, ms) for count, ms in alone.items()]
    for row in rows:
        if row["part"] == "speculative" and row["tree"] != "auto" and row["requests"] in alone:
            check_ms = alone[row["requests"]]
            times = row["round_ms"] - check_ms, check_ms
            found.append(RoundCost.of_shape(TreeShape.parse(row["tree"]), row["requests"], *times, row["ratio"]))
    return found


def pairs(rows: Sequence[dict[str, Any]]) -> Iterator[Pair]:
    """Predict the rows of each setting that has three numbers of requests or more, each number from the others."""
    settings: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(tuple(str(row.get(name)) for name in SETTING), []).append(row)
    for mine in settings.values():
        counts = sorted({row["requests"] for row in mine if row["part"] == "alone"})
        for count in counts if len(counts) > 2 else ():
            known = costs_of([row for row in mine if row["requests"] != count])
            for row in (row for row in mine if row["requests"] == count):
                if row["part"] == "alone":
                    yield Pair(count, "", None, round_ms(prices_of(known, 0.0), ROOT, count), row["round_ms"])
                elif row["part"] == "speculative" and row["tree"] != "auto":
                    tree = TreeShape.parse(row["tree"])
                    ms = round_ms(prices_of(known, row["ratio"]), tree, count)
                    yield Pair(count, row["tree"], row["ratio"], ms, row["round_ms"])


def main() -> None:
    """Print the comparison."""
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    print(f"{'requests':>8}  {'tree':10} {'ratio':>5} {'predicted':>10} {'measured':>9} {'error':>7}")
    for one in pairs(rows):
        ratio = "" if one.ratio is None else f"{one.ratio:g}"
        name = one.tree or "alone"
        print(f"{one.requests:8}  {name:10} {ratio:>5} {one.predicted:10.1f} {one.measured:9.1f} {one.error:+7.1%}")


if __name__ == "__main__":
    main()
