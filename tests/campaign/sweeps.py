"""The sweep that is broken off, starved and raced: its words, and what its files say, read without specvlm."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

from campaign.fork import Child, Ended, specvlm

WORDS = ("-m", "dataset=synthetic", "pruner=two_stage,uniform", "dataset.scenes=3", "frames=4", "max_new_tokens=12")
TIMED = ("_s", "tokens_per_second", "peak_memory_bytes", "speedup_decode", "speedup_end_to_end", "to_last_token")
Rows = dict[tuple[str, str], dict[str, Any]]  # by job and sample


def sweep(folder: Path, *words: object) -> Sequence[str]:
    return [*WORDS, f"hydra.sweep.dir={folder}", *map(str, words)]


def finish(folder: Path, place: Path, *words: object) -> Ended:
    """Run the sweep, or what is left of it, to its end."""
    return Child(specvlm(*sweep(folder, "resume=true", *words)), place).wait(300)


@dataclass(frozen=True)
class Reference:
    """A sweep that ran through: its rows, and how long it took."""

    rows: Rows
    seconds: float


@cache
def reference() -> Reference:
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name, "sweep"), monotonic()
        ended = finish(folder, Path(name, "log"))
        seconds = monotonic() - start
        assert ended.code == 0 and not ended.faults() + damage(folder), ended
        return Reference(rows(folder), seconds)


def untimed(value: Any) -> Any:
    """Without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if not key.endswith(TIMED) and key != "order"}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def rows(folder: Path) -> Rows:
    """Every whole line of every job, without times."""
    lines = [(path.parent.name, line) for path in sorted(folder.glob("*/samples*.jsonl")) for line in whole_lines(path)]
    return {(job, line["sample"]): untimed(line) for job, line in lines}


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """A process that was killed may have left half a line at the end, which the next one cuts off."""
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in whole]


def differences(folder: Path, right: Rows | None = None) -> list[str]:
    """What a finished sweep has otherwise than one that ran through."""
    found, right = rows(folder), right or reference().rows
    wrong = [f"{row} is missing" for row in right.keys() - found.keys()]
    wrong += [f"{row} is one too many" for row in found.keys() - right.keys()]
    for row in right.keys() & found.keys():
        unlike = sorted(key for key in found[row] | right[row] if found[row].get(key) != right[row].get(key))
        wrong += [f"{row} differs in {', '.join(unlike)}"] * bool(unlike)
    wrong += [f"{path.name} was left behind" for path in folder.rglob("*.part")]
    return wrong + damage(folder)


def damage(folder: Path) -> list[str]:
    """What must not be so at any moment: a row twice, or one whose rounds do not give its tokens."""
    found = []
    for path in sorted(folder.glob("*/samples*.jsonl")):
        lines, steps = whole_lines(path), whole_lines(path.with_name(path.name.replace("samples", "steps")))
        names = [line["sample"] for line in lines]
        found += [f"{path.parent.name}: {name} was written twice" for name in set(names) if names.count(name) > 1]
        for line in lines:
            tokens = [token for step in steps if step["sample"] == line["sample"] for token in step["tokens"]]
            if line["status"] == "ok" and tokens != line["token_ids"]:
                found.append(f"{path.parent.name}: the rounds of {line['sample']} do not give its tokens")
    return found
