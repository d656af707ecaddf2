"""Print result rows as tables: `python -m experiments.gpu_pair.report [results.jsonl]`.

The last of several rows with the same key counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
KEY = ("shape", "part", "parallel", "draft_parallel", "target_weights", "draft_weights", "engine", "tree", "video_tokens",
       "ratio", "accepted", "what")  # fmt: skip
EIGHT_BITS = ("fp8", "int8")
MAIN = {"shape": "qwen2_5_vl_32b_7b", "target_weights": "bf16", "tree": "paper"}
SPREAD = {"shape": "llava_onevision_72b_7b", "target_weights": "bf16", "tree": "paper", "engine": "graphs"}
FRAMES = {64: 12_545, 128: 25_089}  # frames and video tokens of LLaVA-OneVision


def read(path: Path) -> list[Row]:
    """Read rows from a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Keep the last row of each key."""
    return list({tuple(row.get(key) for key in KEY): row for row in rows}.values())


def text(rows: Sequence[Row]) -> str:
    """Format all rows: a block per shape and machine, then the targets of issues 3 and 6 if they were measured."""
    rows = against_hf(latest(rows))
    places = dict.fromkeys((row["shape"], row["machine"]) for row in rows)
    blocks = [block([row for row in rows if (row["shape"], row["machine"]) == place]) for place in places]
    three, six = (any(_is(row, **main) for row in rows) for main in (MAIN, SPREAD))
    return "\n\n".join([*blocks, *([targets(rows)] if three else []), *([targets_spread(rows)] if six else [])])


def against_hf(rows: Sequence[Row]) -> list[Row]:
    """Add the speedup over Hugging Face to tensor-parallel rows, which do not measure it themselves.

    The baseline is the `device_map` run of the same file, machine and context.
    """
    places = ("shape", "machine", "video_tokens", "target_weights")
    hf = {tuple(row[key] for key in places): row["ms_per_token"] for row in rows if row["part"] == "hf"}
    found = []
    for row in rows:
        ms = hf.get(tuple(row.get(key) for key in places))
        missing = row["part"] == "rounds" and row.get("parallel") == "tensor" and ms is not None
        found.append(row | {"against_hf": ms / row["ms_per_token"]} if missing and ms else row)
    return found


def block(rows: Sequence[Row]) -> str:
    """Format the rows of one shape on one machine."""
    first = rows[-1]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    said = f"{first['weights']}, at a given acceptance; tree {first['tree']}; commit {commits}; {versions}"
    lines = [f"## {first['shape']} on {first['machine']}, {first['date'][:10]}", "", f"{said}. Times in ms.", ""]
    copied = [row for row in rows if row["part"] == "copy"]
    if copied:
        lines += [f"Device copy, read + write: {copied[-1]['gb_per_s'] / 1000:.2f} TB/s.", ""]
    rounds = [row for row in rows if row["part"] == "rounds"]
    # Acceptance hardly changes a round's time, so show its parts for one acceptance only.
    shown = min((row["accepted"] for row in rounds), key=lambda accepted: abs(accepted - 4), default=None)
    for part, columns in TABLES.items():
        mine = [row for row in rows if row["part"] == part]
        if part == "parts":
            mine = [row for row in rounds if row["accepted"] == shown]
        if part == "rounds":
            mine = side_by_side(mine)
        if mine:
            lines += [*table(mine, part, columns), ""]
    return "\n".join(lines).rstrip()


COMMON = ("parallel", "draft_parallel", "video_tokens", "prefill", "engine", "target_weights", "draft_weights")
TABLES: dict[str, tuple[str, ...]] = {
    "capture": (*COMMON, "s", "of_engine_s"),
    "start": (*COMMON, "ratio", "embed_ms", "prefill_ms", "prune_ms", "draft_prefill_ms", "target_start_ms", "draft_start_ms",
              "peak_gib"),
    "hf": (*COMMON, "ms_per_token", "first_token_ms", "same_tokens"),
    "autoregressive": (*COMMON, "ms_per_token", "floor_ms"),
    "rounds": (*COMMON, "ratio", "ms", "floor_ms", "accepted", "accepted_found", "ms_per_token", "against_ours", "against_hf",
               "predicted_error", "departures"),
    "parts": (*COMMON, "ratio", "ms", "draft_ms", "levels", "draft_pass_ms", "draft_pass_floor_ms", "check_ms",
              "check_floor_ms", "host_ms"),
    "failed": ("what", "error"),
}  # fmt: skip
TITLES = {
    "capture": "First requests: seconds more than the second, and how many of them the engine compiled and captured",
    "start": "Up to the first round, vision included (two_stage; medians of real prefills)",
    "hf": "Hugging Face generate, unmodified",
    "autoregressive": "Our own autoregressive loop",
    "rounds": "Rounds, at a given acceptance",
    "parts": "Parts of a round",
    "failed": "Failed",
}


def side_by_side(rows: Sequence[Row]) -> list[Row]:
    """Merge rounds that differ only in acceptance into one row.

    It lists the per-token figures, and has the median of the rounds' times and the worst prediction.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in (*COMMON, "tree", "ratio")), []).append(row)
    merged = []
    for members in groups.values():
        members = sorted(members, key=lambda row: row["accepted"])
        beside = {}
        for key in ("accepted", "accepted_found", "ms_per_token", "against_ours", "against_hf"):
            if all(row.get(key) is not None for row in members):
                beside[key] = " / ".join(_cell(row[key]) for row in members)
        if beside.get("accepted_found") == beside["accepted"]:
            beside["accepted_found"] = None
        errors = [row["predicted_error"] for row in members if row.get("predicted_error") is not None]
        worst = {"predicted_error": max(errors, key=abs, default=None), "departures": sum(row["departures"] for row in members)}
        merged.append(members[0] | {"against_hf": None} | beside | worst | {"ms": median(row["ms"] for row in members)})
    return merged


def table(rows: Sequence[Row], part: str, columns: Sequence[str]) -> list[str]:
    """Format rows as a table. Columns with a single value go into its title."""
    there = [c for c in columns if any(row.get(c) is not None for row in rows)]
    fixed = [c for c in there if c in COMMON and len(rows) > 1 and len({row.get(c) for row in rows}) == 1]
    shown = [c for c in there if c not in fixed]
    same = ", ".join(f"{c.replace('_', ' ')} {rows[0][c]}" for c in fixed)
    cells = [[c.removesuffix("_ms").replace("_", " ") for c in shown], *([_cell(row.get(c)) for c in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    drawn = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    return [f"{TITLES[part]}{f' ({same})' if same else ''}:", "", drawn[0], rule, *drawn[1:]]


def _cell(value: Any) -> str:
    """Format a value."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"


# ---- targets of issues 3 and 6 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A target figure.

    Attributes:
        what: Name of the figure.
        before: Value of the prototype.
        limit: Target value.
        unit: Unit of both.
        figure: Finds the measured value in the rows; None if it is missing.
        at_least: Whether higher is better.
    """

    what: str
    before: str
    limit: float
    unit: str
    figure: Callable[[Sequence[Row]], float | None]
    at_least: bool = False


def _is(row: Row, **wanted: Any) -> bool:
    """Whether a row has these values."""
    return all(row.get(key) == value for key, value in wanted.items())


def _figure(part: str, key: str, **wanted: Any) -> Callable[..., float | None]:
    """Make a figure of the main pair; by default at 16,384 video tokens, with a bf16 draft and the graphs engine."""
    wanted = MAIN | {"part": part, "video_tokens": 16384, "draft_weights": "bf16", "engine": "graphs"} | wanted

    def figure(rows: Sequence[Row]) -> float | None:
        found = [row[key] for row in rows if _is(row, **wanted) and row.get(key) is not None]
        return found[-1] if found else None

    return figure


def _rounds(key: str, weights: str = "bf16", **more: Any) -> Callable[..., float | None]:
    """Make a figure at ratio 0.9 with 4 accepted. weights="8-bit": fp8 or int8, whichever has the shorter round."""
    if weights != "8-bit":
        return _figure("rounds", key, **({"ratio": 0.9, "accepted": 4.0, "draft_weights": weights} | more))

    def figure(rows: Sequence[Row]) -> float | None:
        ms = {kind: _rounds("ms", kind, **more)(rows) for kind in EIGHT_BITS}
        there = [kind for kind in EIGHT_BITS if ms[kind] is not None]
        return _rounds(key, min(there, key=lambda kind: ms[kind] or 0.0), **more)(rows) if there else None

    return figure


def growth(rows: Sequence[Row]) -> float | None:
    """Divide the round at 131,072 video tokens by the one at 16,384 plus the time to read the added KV bytes."""
    short, long = (_rounds("ms", "bf16", video_tokens=n)(rows) for n in (16384, 131072))
    floors = [_rounds("floor_ms", "bf16", video_tokens=n)(rows) for n in (16384, 131072)]
    if short is None or long is None or floors[0] is None or floors[1] is None:
        return None
    return long / (short + floors[1] - floors[0])


def _seconds(figure: Callable[..., float | None]) -> Callable[..., float | None]:
    """Convert a figure from ms to seconds."""
    return lambda rows: None if (ms := figure(rows)) is None else ms / 1000


GOALS = (
    Goal("autoregressive, per token", "20.7 ms", 19.0, "ms", _figure("autoregressive", "ms_per_token")),
    Goal("check of 26 rows", "23.3 ms", 20.5, "ms", _rounds("check_ms")),
    Goal("draft pass, pruned context, bf16", "5.6 ms", 4.7, "ms", _rounds("draft_pass_ms", "bf16")),
    Goal("draft pass, pruned context, 8-bit", "-", 3.0, "ms", _rounds("draft_pass_ms", "8-bit")),
    Goal("round, host included, bf16 draft", "51 ms", 44.0, "ms", _rounds("ms", "bf16")),
    Goal("round, host included, 8-bit draft", "-", 36.0, "ms", _rounds("ms", "8-bit")),
    Goal("4.0 accepted, against our autoregressive, bf16", "2.0 x", 2.15, "x", _rounds("against_ours", "bf16"), True),
    Goal("4.0 accepted, against our autoregressive, 8-bit", "-", 2.6, "x", _rounds("against_ours", "8-bit"), True),
    Goal("4.0 accepted, against Hugging Face generate, bf16", "6 x", 7.0, "x", _rounds("against_hf", "bf16"), True),
    Goal("4.0 accepted, against Hugging Face generate, 8-bit", "-", 8.5, "x", _rounds("against_hf", "8-bit"), True),
    Goal("target prefill, vision included", "-", 3.0, "s", _seconds(_figure("start", "target_start_ms", ratio=0.9))),
    Goal("drafter start at ratio 0.9, its vision too", "-", 1.0, "s", _seconds(_figure("start", "draft_start_ms", ratio=0.9))),
    Goal("peak memory", "-", 92.0, "GiB", _figure("start", "peak_gib", ratio=0.9)),
    Goal("round at 128k over (16k + its further KV bytes)", "-", 1.25, "x", growth),
)


def _spread(part: str, key: str, **wanted: Any) -> Callable[[Sequence[Row]], float | None]:
    """Make a figure: the best over draft placements, with a bf16 draft, or with a quantised one if `few_bits`."""
    few = wanted.pop("few_bits", False)
    wanted = SPREAD | {"part": part} | wanted

    def figure(rows: Sequence[Row]) -> float | None:
        mine = [row for row in rows if _is(row, **wanted) and (row.get("draft_weights") != "bf16") == few]
        return max((row[key] for row in mine if row.get(key) is not None), default=None)

    return figure


def _over_floor(tokens: int) -> Callable[[Sequence[Row]], float | None]:
    """Make a figure: tensor-parallel autoregressive time over its bandwidth floor."""
    ms, floor = (_spread("autoregressive", key, parallel="tensor", video_tokens=tokens) for key in ("ms_per_token", "floor_ms"))
    return lambda rows: None if (took := ms(rows)) is None else took / (floor(rows) or float("nan"))


def _spread_goals() -> list[Goal]:
    """List the targets of issue 6."""
    goals = []
    for frames, tokens in FRAMES.items():
        for form in ("layers", "tensor"):
            where = {"parallel": form, "video_tokens": tokens, "ratio": 0.9, "accepted": 4.0}
            for versus, limit, key, more in (
                ("our autoregressive in the same form", 3.0, "against_ours", {}),
                ("our autoregressive, draft in 8 or 4 bits", 3.0, "against_ours", {"few_bits": True}),
                ("Hugging Face generate, device_map", 5.0, "against_hf", {}),
            ):
                figure = _spread("rounds", key, **where, **more)
                goals.append(Goal(f"{form}, {frames} frames, against {versus}", "-", limit, "x", figure, True))
        over = _over_floor(tokens)
        goals.append(Goal(f"tensor, {frames} frames, autoregressive over its bandwidth floor", "-", 1.4, "x", over))
    return goals


def targets_spread(rows: Sequence[Row]) -> str:
    """Format the table of issue 6."""
    return _goals("LLaVA-OneVision-72B <- 7B in bf16 over several GPUs, 4.0 accepted, ratio 0.9", _spread_goals(), rows)


def targets(rows: Sequence[Row]) -> str:
    """Format the table of issue 3."""
    return _goals("Qwen2.5-VL-32B <- 7B, 16,384 video tokens", GOALS, rows)


def _goals(title: str, goals: Sequence[Goal], rows: Sequence[Row]) -> str:
    """Format targets with their measured figures."""
    rows = latest(rows)
    lines = [f"## Targets: {title}, 26-row tree, random weights, at a given acceptance", ""]
    lines += ["| what | prototype | target | measured | |", "|---|---|---|---|---|"]
    for goal in goals:
        found = goal.figure(rows)
        sign = ">=" if goal.at_least else "<="
        verdict = "" if found is None else "pass" if (found >= goal.limit) == goal.at_least or found == goal.limit else "MISS"
        measured = "not measured" if found is None else f"{found:.2f} {goal.unit}"
        lines.append(f"| {goal.what} | {goal.before} | {sign} {goal.limit:g} {goal.unit} | {measured} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.jsonl"
    if not file.is_file():
        sys.exit(f"{file}: no such file; python -m experiments.gpu_pair writes it")
    print(text(read(file)))
