"""TensorBoard as a tracker: event files, written by tensorboardX."""

import hashlib
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from specvlm import TrackContext, TrackedRun, Tracker, hookimpl

FOLDER = "tensorboard"  # below the results
MOST_ROWS, MOST_TEXT = 200, 400  # of a table that TensorBoard shows, and characters of a cell


@dataclass(frozen=True)
class TensorboardTracker(Tracker):
    """TensorBoard: a run for each job, in `tensorboard` below the results.

    Curves by round and by sample, the table of samples, pictures of the kept tokens, and totals by configuration under
    HPARAMS. `tensorboard --logdir FOLDER` shows them; it is a package of its own.

    Event files are written at once and not in the background, so that a full disk is noticed.

    Attributes:
        pictures: Whether to write a picture of the kept tokens of each sample.
    """

    name = "tensorboard"
    pictures: bool = True

    def start(self, ctx: TrackContext) -> TrackedRun:
        return TensorboardRun(ctx.folder / FOLDER / folder_name(ctx.name), dict(flat(ctx.config)), self.pictures)

    def next_step(self, folder: Path) -> str:
        return f"tensorboard --logdir {shlex.quote(str(folder / FOLDER))}" if (folder / FOLDER).is_dir() else ""


class TensorboardRun(TrackedRun):
    """An open run. Points of an earlier run of the job, as after `resume=true`, are hidden.

    Args:
        folder: Where its event file lies.
        config: Configuration of the job by dotted key.
        pictures: See `TensorboardTracker`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], pictures: bool) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.pictures, self.event = config, pictures, Event
        self.writer = EventsWriter(str(folder / "events"))
        self.writer.write_event(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        self.writer.flush()

    def log(self, series: str, index: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for key, value in values.items():
            self.add(scalar(f"{series}/{key}", float(value)), index)
        if series == "sample":
            self.writer.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        from tensorboardX.summary import image, text

        shown = [at for at, _ in enumerate(columns) if any(picture_free(row[at]) is not None for row in rows)]
        lines = [[columns[at] for at in shown], ["---"] * len(shown), *([row[at] for at in shown] for row in rows[:MOST_ROWS])]
        self.add(text(name, "\n".join("|".join(map(cell, line)) for line in lines)))
        for index, row in enumerate(rows if self.pictures else ()):
            for column, value in zip(columns, row, strict=True):
                if isinstance(value, Image.Image):
                    self.add(image(f"{name}/{column}", np.asarray(value.convert("RGB")), dataformats="HWC"), index)

    def summary(self, values: Mapping[str, Any]) -> None:
        from tensorboardX.summary import hparams, scalar

        totals = {f"total/{key}": float(value) for key, value in flat(values) if isinstance(value, int | float)}
        for summary in hparams(dict(self.config), totals):
            self.add(summary)
        for key, value in totals.items():
            self.add(scalar(key, value))

    def finish(self, code: int) -> None:
        from tensorboardX.summary import scalar

        self.add(scalar("total/exit_code", float(code)))
        self.writer.close()

    def add(self, summary: Any, index: int = 0) -> None:
        """Write one summary, a protocol buffer."""
        self.writer.write_event(self.event(wall_time=time.time(), step=index, summary=summary))


def folder_name(name: str) -> str:
    """Turn the name of a job into that of a folder. Names that differ give folders that differ."""
    plain = re.sub(r"[^\w=.,-]+", "_", name)[:80].strip(".") or "job"
    return plain if plain == name.replace(" ", "_") else f"{plain}-{hashlib.sha256(repr(name).encode()).hexdigest()[:8]}"


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield numbers and texts by dotted key. Lists become texts; None is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        elif value is not None:
            yield f"{above}{key}", value if isinstance(value, bool | int | float) else readable(value)


def cell(value: Any) -> str:
    """Format a cell of a Markdown table."""
    if value is None or isinstance(value, Image.Image):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else re.sub(r"[\s|]+", " ", readable(value))[:MOST_TEXT]


def picture_free(value: Any) -> Any:
    """Return a cell's value, None for a picture."""
    return None if isinstance(value, Image.Image) else value


def readable(value: object) -> str:
    """Return a text that UTF-8 can hold."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


@hookimpl
def specvlm_strategies() -> list[type]:
    return [TensorboardTracker]
