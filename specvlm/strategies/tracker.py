"""Base class of trackers, which mirror results elsewhere, and their context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specvlm.strategies.base import Strategy

if TYPE_CHECKING:
    from PIL.Image import Image

    Cell = float | int | str | bool | Image | None


def _silent(line: str) -> None:
    """Ignore the line."""


@dataclass(frozen=True)
class TrackContext:
    """The job that a tracker is to mirror.

    Attributes:
        name: Name of the job, any text; different for each job of a sweep.
        group: Name of the sweep, or of the folder of a single job.
        folder: Folder of the sweep or of the single job. A tracker keeps its files in its own subfolder.
        config: Configuration of the job: plain values, nested by group. For a sweep, the names of its jobs.
        kind: "job", or "sweep" for the table of all jobs, which comes last.
        note: Shows the user a line.
        shared: Values that the tracker keeps for the other jobs of this command.
    """

    name: str
    group: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "job"
    note: Callable[[str], None] = _silent
    shared: dict[str, Any] = field(default_factory=dict)


class TrackedRun(ABC):
    """The mirror of one job while it runs. Runs of several jobs are open at the same time.

    Methods are called from several threads, but never two at the same time. If a method raises, nothing more of its job
    is mirrored. If logging an event takes longer than 90 s, the tracker is turned off for all jobs of the command. Both
    show a note. Results are on disk before any method is called.
    """

    @abstractmethod
    def log(self, series: str, index: int, values: Mapping[str, float]) -> None:
        """Take one point of a series.

        Args:
            series: "round" for each round of decoding, "sample" for each sample that is done.
            index: Place in the series, from 0. Samples come in any order, and some may be missing.
            values: Numbers by name, such as `accepted` or `speedup_decode`. Names may differ from point to point.
        """

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:  # noqa: B027  (may stay as it is)
        """Take a table: "samples" at the end of a job, "jobs" at the end of a sweep. By default it is dropped.

        Args:
            name: Name of the table.
            columns: Names of the columns.
            rows: Rows of cells: numbers, texts of any length and content, pictures, or None.
        """

    def summary(self, values: Mapping[str, Any]) -> None:  # noqa: B027
        """Take the totals of a job, as in summary.json: plain values, some nested. By default they are dropped."""

    @abstractmethod
    def finish(self, code: int) -> None:
        """End the run. This is the last call to it. code: exit code of the job, 0 if all is well."""


class Tracker(Strategy, ABC):
    """Base class of trackers: they mirror the results of jobs over a data set in an experiment tracker.

    If a job is killed, `TrackedRun.finish` is never called. If the job is then resumed, it starts a new run, which gets
    all samples, including those done before.
    """

    kind = "tracker"

    @abstractmethod
    def start(self, ctx: TrackContext) -> TrackedRun | None:
        """Start the run of a job. Import large libraries here, not at the top of the module.

        Args:
            ctx: The job.

        Returns:
            The run. None to leave the job out.
        """

    def next_step(self, folder: Path) -> str:
        """Return a command to suggest to the user when all jobs are done; empty for none.

        Args:
            folder: The results folder. The command may, for example, upload what it holds.
        """
        return ""
