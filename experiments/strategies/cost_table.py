"""The table of what selection costs, of rows of `costs.py`, and whether it stays within a share of the target's prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.gpu_pair.report import MAIN, latest, read
from experiments.strategies.settings import HERE, RATIO
from specvlm.errors import UserError

Row = dict[str, Any]
SHARE = 0.05  # of the target's prefill
GPU, NOT_RUN = ("cuda", 0), "not run"


def target_prefill() -> tuple[float, str]:
    """ms of the main pair's prefill at 16,384 video tokens, and the machine, as experiments/gpu_pair measured it."""
    rows = latest(read(HERE.parent / "gpu_pair" / "results.jsonl"))
    wanted = {"shape": MAIN["shape"], "part": "start", "video_tokens": 16384, "ratio": RATIO, "draft_weights": "bf16"}
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if not found:
        raise UserError("experiments/gpu_pair/results.jsonl has no prefill to compare with")
    return found[-1]["prefill_ms"], found[-1]["machine"]


def last(rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
    """The last row of each device, its threads (0 of a GPU), pruner and content."""

    def key(row: Row) -> tuple[object, ...]:
        return row["device"], row["threads"] if row["device"] == "cpu" else 0, row["pruner"], row["content"]

    return {key(row): row for row in rows}


def slowest(rows: Sequence[Row], place: tuple[object, ...]) -> dict[str, float]:
    """ms by pruner, of its worse content, the rule that weighs rows included."""
    found: dict[str, float] = {}
    for key, row in last(rows).items():
        if key[:2] == place and "ms" in row:
            found[row["pruner"]] = max(found.get(row["pruner"], 0.0), row["ms"] + row.get("row_weights_ms", 0.0))
    return found


def costs(rows: Sequence[Row]) -> Iterator[str]:
    table = last(rows)
    prefill_ms, machine = target_prefill()
    limit = SHARE * prefill_ms
    places = sorted({*(key[:2] for key in table), GPU}, reverse=True)
    heads = ["GPU" if place == GPU else f"{place[1]} CPU thread{'s' if place[1] > 1 else ''}" for place in places]
    for place, head in zip(places, heads, strict=True):
        mine = [row for key, row in table.items() if key[:2] == place]
        if mine:
            commits = ", ".join(dict.fromkeys(row["commit"] for row in mine))
            versions = ", ".join(f"{name} {number}" for name, number in mine[-1]["versions"].items())
            said = (
                f"{mine[-1]['machine']}, states in {mine[-1]['dtype']}, {versions}, {mine[-1]['date'][:10]}, commit {commits}"
            )
        yield f"- {head}: {said if mine else NOT_RUN}"
    yield f"\n{SHARE:.0%} of the target's prefill ({prefill_ms:,.0f} ms, {machine}): {limit:.0f} ms.\n"
    heads = ["pruner", "operations", *(f"{head}, ms" for head in heads), "first call on the GPU", "memory there", "within 5 %"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    gpu = slowest(rows, GPU)
    for name in dict.fromkeys(str(key[2]) for key in table):
        all_mine = [row for key, row in table.items() if key[2] == name]
        there = [row for row in all_mine if row["device"] == GPU[0] and "ms" in row]
        counts = dict.fromkeys(row["operations"] for row in there or all_mine if "operations" in row)
        first = f"{max(row['first_ms'] for row in there):.0f} ms" if there else NOT_RUN
        peak = f"{max(row['peak_bytes'] for row in there) / 2**20:,.0f} MiB" if there else NOT_RUN
        within = NOT_RUN if name not in gpu else "yes" if gpu[name] <= limit else "**no**"
        cells = [f"`{name}`", " / ".join(map(str, counts)), *(figures(table, place, name) for place in places)]
        yield f"| {' | '.join([*cells, first, peak, within])} |"


def figures(table: dict[tuple[object, ...], Row], place: tuple[object, ...], name: str) -> str:
    """Both contents beside each other, the rule that weighs rows behind a plus."""
    rows = [row for key, row in table.items() if key[:2] == place and key[2] == name]
    if not rows:
        return NOT_RUN
    said = [row["error"] if "error" in row else f"{row['ms']:.1f}" if row["ms"] < 100 else f"{row['ms']:.0f}" for row in rows]
    weights = next((f" + {row['row_weights_ms']:.1f}" for row in rows if "row_weights_ms" in row), "")
    return " / ".join(said) + weights
