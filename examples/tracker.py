"""Mirror every job into a file of lines of JSON, as a program of your own would read them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specvlm import TrackContext, TrackedRun, Tracker, hookimpl


@dataclass(frozen=True)
class LinesTracker(Tracker):
    """One file of JSON lines per job, in `lines` below the results.

    rounds: whether to write a line per round, too.
    """

    name = "lines"
    rounds: bool = False

    def start(self, ctx: TrackContext) -> TrackedRun | None:
        file = ctx.folder / "lines" / (re.sub(r"[^\w=.,]+", "_", ctx.name)[:80] + ".jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"job": ctx.name, "config": dict(ctx.config)}) + "\n")
        return LinesRun(file, self.rounds)

    def next_step(self, folder: Path) -> str:
        return f"tail {folder / 'lines'}/*.jsonl"


class LinesRun(TrackedRun):
    def __init__(self, file: Path, rounds: bool) -> None:
        self.file, self.rounds = file, rounds

    def log(self, series: str, index: int, values: Mapping[str, float]) -> None:
        if series == "sample" or self.rounds:
            self.write({series: index} | dict(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.write({"totals": dict(values)})

    def finish(self, code: int) -> None:
        self.write({"exit_code": code})

    def write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


@hookimpl
def specvlm_strategies() -> list[type]:
    return [LinesTracker]


if __name__ == "__main__":
    run = LinesTracker().start(TrackContext("a job", "a sweep", Path(".")))
    run.log("sample", 0, {"speedup_decode": 1.9})
    run.finish(0)
    print(Path("lines/a_job.jsonl").read_text())
