"""Mirror results to a tracker, such as Weights & Biases: one run per job. Files on disk are written first.

An error of the tracker ends the mirror of that job, with a note; the job continues.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from specvlm.errors import line, one_line
from specvlm.process.settings import settled
from specvlm.results.metrics import LATER
from specvlm.strategies import TrackContext, TrackedRun, Tracker, registry
from specvlm.strategies.fence import inside

LIMIT_S = 90.0  # limit on every call; a tracker that takes longer is turned off for all jobs of the command
# Keys of a round that are logged, each with a function that makes a number of its value.
ROUND: dict[str, Callable[[Any], int]] = {"tokens": len, "drafted": int, "accepted": int}
FIGURES = ("accepted_per_round", "kept_tokens", "video_tokens", "new_tokens", "rounds", "decode_s", "end_to_end_s",
           "baseline_decode_s", "baseline_end_to_end_s", "speedup_decode", "speedup_end_to_end", "tokens_per_second",
           "time_to_first_token_s", "drafter_start_s", "peak_memory_bytes", "order",
           *(key for key in LATER if not key.startswith("hf_")))  # fmt: skip
TEXTS = ("status", "verdict", "reason", "question", "answer", "text")
MOST = 200  # characters of an error message that are shown
CELL = 6  # pixels per video token in the picture


@dataclass
class Tracking:
    """The tracker of one command, for all its jobs.

    Attributes:
        chosen: The tracker's name and fields, see `registry.settings`.
        note: Shows a message to the user.
        shared: `TrackContext.shared` of all jobs.
        hangs: Whether a call took longer than LIMIT_S: then the tracker is not called again.
    """

    chosen: Any
    note: Callable[[str], None]
    shared: dict[str, Any] = field(default_factory=dict)
    hangs: bool = False

    @property
    def label(self) -> str:
        """The tracker's name and, unless it is built in, the package that provides it."""
        plugin = registry.find("tracker", self.chosen.name).plugin
        return f"tracker={self.chosen.name}" + (f" ({plugin})" if plugin != "specvlm" else "")

    def next_step(self, folder: Path) -> str:
        """Return `Tracker.next_step` as one line; empty if it fails."""
        found: list[str] = []
        self.call(lambda: found.append(line(str(self._built().next_step(folder)))), "cannot say what to do next")
        return found[0] if found else ""

    def start(self, ctx: TrackContext) -> TrackedRun | None:
        """Start the run of a job; None if the tracker leaves the job out. Raises TypeError for any other result."""
        run = self._built().start(ctx)
        if run is not None and not isinstance(run, TrackedRun):
            raise TypeError(f"start returned a {type(run).__name__}, expected a TrackedRun or None")
        return run

    def call(self, action: Callable[[], object], failed: str = "is off for this job") -> bool:
        """Call into the tracker, in a thread of its own. Returns whether that succeeded; shows a note if not.

        Args:
            action: Function to call. The thread confines torch's modes, exits and interrupts of the tracker.
            failed: What the note says about the tracker if the call fails.
        """
        if self.hangs:
            return False
        try:
            with settled(), inside(registry.find("tracker", self.chosen.name).cls):
                error = failure_of(action, LIMIT_S)
        except BaseException:  # Ctrl-C: the thread may still be running
            self.hangs = True
            raise
        if error is None:
            return True
        if isinstance(error, Hangs):
            self.hangs, failed = True, "is off from here on"
        self.note(f"{self.label} {failed} ({one_line(error)[:MOST]}); results are not affected")
        return False

    def _built(self) -> Tracker:
        tracker: Tracker = registry.build("tracker", self.chosen)
        return tracker


class Mirror:
    """Mirror of one job. Does nothing before `begin`, after an error, or without a tracker."""

    def __init__(self, tracking: Tracking | None) -> None:
        self.tracking = tracking
        self.run: TrackedRun | None = None
        self.rows: dict[str, Mapping[str, Any]] = {}
        self.rounds = 0  # logged so far

    def begin(self, name: str, group: str, folder: Path, config: Mapping[str, Any], kind: str = "job") -> None:
        """Start the run of this job; for the arguments see `TrackContext`."""
        if (tracking := self.tracking) is None:
            return
        ctx = TrackContext(name, group, folder, config, kind, tracking.note, tracking.shared)
        begun: list[TrackedRun | None] = []
        if tracking.call(lambda: begun.append(tracking.start(ctx))):
            (self.run,) = begun

    def sample(self, row: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> None:
        """Log a finished sample. row: its line of samples.jsonl; rounds: its lines of steps.jsonl."""
        if self.run is None:
            return
        first, self.rounds = self.rounds, self.rounds + len(rounds)
        self.rows[row["sample"]] = row

        def log(run: TrackedRun) -> None:
            for place, found in enumerate(rounds, start=first):
                run.log("round", place, round_values(found) | {"of_sample": row["index"]})
            run.log("sample", row["index"], sample_values(row))

        self._call(log)

    def finish(self, totals: Mapping[str, Any], code: int) -> None:
        """Log the table of samples and the totals, and end the run with an exit code."""
        if self.run is None:
            return
        columns = ("sample", "kept", *TEXTS, *FIGURES)
        known = {key: value for key, value in totals.items() if value is not None}

        def end(run: TrackedRun) -> None:
            rows = sorted(self.rows.values(), key=lambda row: row["index"])
            cells = [[row["sample"], kept_picture(row), *(row.get(key) for key in (*TEXTS, *FIGURES))] for row in rows]
            run.table("samples", columns, cells)
            run.summary(known)
            run.finish(int(code))

        self._call(end)
        self.run = None

    def jobs(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Log a sweep, as a table with one row of totals per job, and end the run."""
        if self.run is None:
            return
        columns = list(dict.fromkeys(key for point in points for key in point))

        def end(run: TrackedRun) -> None:
            run.table("jobs", columns, [[point.get(key) for key in columns] for point in points])
            run.finish(0)

        self._call(end)
        self.run = None

    def _call(self, action: Callable[[TrackedRun], object]) -> None:
        """Call into the run. If that fails, the mirror is off."""
        run = self.run
        assert run is not None and self.tracking is not None
        if not self.tracking.call(lambda: action(run)):
            self.run = None


class Hangs(Exception):
    """A call took longer than its limit."""


def failure_of(action: Callable[[], object], seconds: float) -> BaseException | None:
    """Run `action` in a thread, abandoned after `seconds`. Returns its exception, or Hangs; None if it succeeded."""
    raised: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:  # Ctrl-C is raised only in the main thread
            raised.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return Hangs(f"no answer within {seconds:g} s") if thread.is_alive() else next(iter(raised), None)


def round_values(found: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a round. found: its line of steps.jsonl."""
    counts = {key: made(found[key]) for key, made in ROUND.items()}
    return counts | {f"{part}_s": seconds for part, seconds in found["times_s"].items()} | {"number": found["round"]}


def sample_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a sample. row: its line of samples.jsonl."""
    scores = (row.get("scores") or {}).items()
    figures = {key: row[key] for key in FIGURES if isinstance(row.get(key), int | float)}
    return figures | {f"score_{metric}": score for metric, score in scores if score is not None}


def kept_picture(row: Mapping[str, Any]) -> Image.Image | None:
    """Draw all frames in a grid, one square per token, bright if the drafter saw it; None if no pruner was used.

    Tokens that belong to no frame are left out.
    """
    if row.get("kept") is None or not row.get("grids"):
        return None
    kept, parts, start = np.zeros(row["video_tokens"], np.uint8), [], 0
    kept[row["kept"]] = 1
    for frames, height, width, newline in row["grids"]:
        cells = kept[start : start + frames * height * width].reshape(frames, height, width)
        start += frames * height * width + newline
        across = int(np.ceil(frames**0.5))
        sheet = np.full((-(-frames // across) * (height + 1), across * (width + 1)), 128, np.uint8)
        for number, frame in enumerate(cells):
            top, left = number // across * (height + 1), number % across * (width + 1)
            sheet[top : top + height, left : left + width] = 24 + 231 * frame
        parts.append(sheet)
    wide = max(part.shape[1] for part in parts)
    whole = np.concatenate([np.pad(part, ((0, 1), (0, wide - part.shape[1])), constant_values=128) for part in parts])
    return Image.fromarray(whole).resize((whole.shape[1] * CELL, whole.shape[0] * CELL), Image.Resampling.NEAREST)
