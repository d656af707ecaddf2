"""Run the jobs of a sweep in turn, a few samples each, over models that are loaded once."""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

from hydra.types import RunMode

from specvlm.app import job_names
from specvlm.app.console import RunConsole, left
from specvlm.app.hf_check import check_rows, unchecked
from specvlm.app.job import Job
from specvlm.app.model_cache import MODEL_CACHE, ModelCache
from specvlm.app.placement import places_of
from specvlm.app.quoting import FOLDERS
from specvlm.app.readings import Readings
from specvlm.app.samples import windows
from specvlm.app.together import job_class
from specvlm.config import RunConfig
from specvlm.errors import ExitCode, JobFailed, UserError, worst
from specvlm.parallel.ranks import joined
from specvlm.results.metrics import MEANS, SPANS, totals
from specvlm.results.mirror import Mirror, Tracking
from specvlm.results.rows import CannotWrite, Taken, config_of, rows_of, summary_of
from specvlm.strategies.fence import contained

FATAL = (JobFailed, CannotWrite, Taken, BrokenPipeError)  # errors that end the whole sweep


class Sweep:
    """The jobs that Hydra starts. `add` runs a job over samples; if `together` is set, the job waits for `finish`.

    Runs of one video are only listed here, for the table.

    Args:
        folder: Folder of the sweep, or of a single job.
        tell: Reports an error and returns its exit code.
    """

    def __init__(self, folder: Path, tell: Callable[[Exception], int]) -> None:
        self.folder, self.tell, self.home, self.together = folder, tell, os.getpid(), False
        self.tracker: Any = None  # its settings
        self.words: dict[Path, str] = {}  # label of each job, by folder
        self.labels: dict[Path, str] = {}  # the same without the words that all jobs share
        self.common = self.name = ""
        self.tracking: Tracking | None = None
        self.jobs: list[Job] = []
        self.failures: dict[Path, dict[str, Any]] = {}  # summaries of jobs that could not start
        self.begun: list[tuple[Job, str]] = []  # started in this process, with the key that names the folder
        self.ended: Exception | None = None  # error that `add` keeps for `finish` to raise

    def expect(self, words: Mapping[Path, str], tracker: Any) -> None:
        """Announce jobs, and remove the words that all jobs share from their labels. words: labels, by folder."""
        self.words |= words
        self.tracker = tracker
        short, self.common = job_names.split_shared(list(self.words.values())) if self.words else ([], "")
        self.labels = dict(zip(self.words, short, strict=True))
        presets = [word.partition("=")[2] for word in self.common.split(" ") if word.startswith("experiment=")]
        self.name = " ".join([*presets, self.folder.name]).strip()

    def add(self, cfg: RunConfig, folder: Path, hydra: Any) -> int:
        """Add a job over samples; run it now unless jobs wait for `finish`. Returns the exit code.

        An error that ends all jobs is kept for `finish` to raise. In a worker process it is reported here.

        hydra: Hydra's own configuration.
        """
        if self.ended:
            return ExitCode.OK
        try:
            return self._add(cfg, folder, hydra)
        except (*FATAL, UserError) as error:
            if os.getpid() != self.home:
                return self.tell(error)
            self.ended = error  # raised by `finish`: Hydra would reformat it here
            return ExitCode.OK

    def _add(self, cfg: RunConfig, folder: Path, hydra: Any) -> int:
        """Start a job, then run it or let it wait. A job of a sweep that cannot start is noted as failed."""
        several = hydra.mode == RunMode.MULTIRUN
        above = self.folder if several else folder
        label = self.labels.get(folder, "") if self.labels else job_names.label(hydra.overrides.task)
        job = job_class(cfg)(cfg, folder, above, MODEL_CACHE, label=label, group=self.name, tracking=self._tracking())
        try:
            with contained():
                ranks = places_of(cfg).ranks  # builds the drafter, which may fail
                if ranks == 1:
                    job.start()
        except FATAL:
            raise
        except Exception as error:
            if isinstance(error, UserError) and not several:
                raise  # print one line and leave nothing behind, as a run of one video does
            self.failures[folder] = job.fail(error)
            code = self.tell(error)
            if cfg.fail_fast:
                raise JobFailed(code) from error
            return code
        if ranks > 1:
            try:
                return share_ranks(cfg, folder)
            except Exception as error:
                return self.tell(error)
        self.begun.append((job, FOLDERS[several]))
        if self.together:
            self.jobs.append(job)
            return ExitCode.OK
        return take_turns([job], cfg.turn, self.tell)

    def _tracking(self) -> Tracking | None:
        """The tracker that all jobs share; None without one."""
        if self.tracking is None and self.tracker is not None:
            self.tracking = Tracking(self.tracker, RunConsole().note)
        return self.tracking

    def finish(self) -> int:
        """Run the waiting jobs; returns the worst exit code. Raises the error that `add` kept, if there is one."""
        if self.ended:
            raise self.ended
        jobs, self.jobs = self.jobs, []
        return take_turns(jobs, jobs[0].cfg.turn, self.tell) if jobs else ExitCode.OK

    def mismatch(self) -> list[int]:
        """Return [MISMATCH] if the summary of any job counts one, else []."""
        found = [summary_of(folder) for folder in self.labels]
        wrong = any("MISMATCH" in summary.get(key, {}) for summary in found for key in ("verdicts", "hf_checks"))
        return [ExitCode.MISMATCH] if wrong else []

    def close(self) -> None:
        """Close the jobs that still wait for `finish`."""
        for job in self.jobs:
            with suppress(CannotWrite):
                job.close()

    def show(self) -> None:
        """Print the table of jobs, and log it to the tracker if there are several.

        Does nothing if no job has a result, or if `add` has kept an error.
        """
        if self.ended:
            return
        screen, never = RunConsole(), {"status": "failed", "reason": "it never started"}
        found = {folder: self._state_of(folder) for folder in self.labels}
        if not any(found.values()):
            return
        told = [(label, found[folder] or never) for folder, label in self.labels.items()]
        unfinished = [option for job, option in self.begun if job.todo or unchecked(job)]
        go_on = f"resume=true {shlex.quote(f'{unfinished[0]}={self.folder}')}" if unfinished else ""
        screen.jobs(told, self.common, self.folder, go_on)
        if tracking := self._tracking():
            if len(found) > 1:
                mirror = Mirror(tracking)
                mirror.begin(f"{self.name}: all jobs", self.name, self.folder, {"jobs": list(self.labels.values())}, "sweep")
                mirror.jobs([self._point(folder, found[folder]) for folder in found if "samples" in found[folder]])
            screen.note(tracking.next_step(self.folder))

    def _point(self, folder: Path, found: dict[str, Any]) -> dict[str, Any]:
        """Row of a job in the tracker's table of jobs. found: the job's summary."""
        cfg = config_of(folder)
        chosen = {kind: cfg[kind]["name"] for kind in ("pruner", "drafter", "verifier", "dataset")}
        figures = {key: found.get(key) for key in (*MEANS, *(f"speedup_{span}" for span in SPANS), "ok", "failed", "skipped")}
        figures |= {f"score_{metric}": total["mean"] for metric, total in (found.get("scores") or {}).items()}
        return {"job": self.labels[folder]} | chosen | {key: cfg[key] for key in ("ratio", "frames", "seed")} | figures

    def _state_of(self, folder: Path) -> dict[str, Any]:
        """Summary of a job, computed from its rows if it was not written; empty if there are no results."""
        found = self.failures.get(folder) or summary_of(folder)
        if "token_ids" in found:  # a run of one video
            return totals([{"status": "ok", **dict.fromkeys(("dataset", "split", "version")), "sample": "", **found}], 1)
        return found or (totals(rows, len(rows)) if (rows := rows_of(folder)) else {})


@dataclass(frozen=True)
class Task:
    """A sample to be answered by a job.

    Attributes:
        window: Number of the group of samples whose readings are kept until all jobs are done with them.
        job: The job.
        index: Index of the sample in the data set.
        place: Position of the job in this window's order of jobs.
    """

    window: int
    job: Job
    index: int
    place: int


def take_turns(jobs: Sequence[Job], turn: int, tell: Callable[[Exception], int]) -> int:
    """Run all jobs to their end in the order of `schedule`; returns the worst exit code.

    Jobs that share a target run together, one target after the other. Then their answers are checked, if `check` is
    set. If a job fails, the others continue, unless it has fail_fast set: then JobFailed is raised. Errors in FATAL are
    raised.

    Args:
        jobs: Started jobs.
        turn: Samples per turn.
        tell: Reports the error of a failed job and returns its exit code.
    """
    codes, groups = list[int](), dict[Any, list[Job]]()
    for job in jobs:
        groups.setdefault(job.held.target_of(job.setup), []).append(job)
    began, samples = monotonic(), sum(len(job.todo) for job in jobs)

    def time_left() -> str:
        more = sum(len(job.todo) for job in jobs)
        return left(samples - more, more, began)

    for job in jobs:
        job.left = time_left
    with Readings() as readings:
        try:
            for group in groups.values():
                for task, read_next in walk(schedule(group, turn), readings):
                    codes.append(_turn(task, readings, read_next, tell))
                codes += check_rows(group, readings, tell)
                codes += [job.close() for job in group]
        finally:
            for job in jobs:
                with suppress(CannotWrite):  # reported already
                    job.close()
    return worst(codes)


def schedule(jobs: Sequence[Job], turn: int) -> list[Task]:
    """Order the samples of all jobs. turn: number of samples that a job answers before it is the next job's turn.

    Questions about one video follow each other, and a turn ends with a video (`samples.windows`). The order of jobs
    rotates by one after each turn, so that no job is always first. The order depends only on the data set, so it is the
    same in an interrupted or sharded sweep. Shards of one configuration count as one job.
    """
    folders = dict[Any, list[tuple[Job, set[int]]]]()
    for job in jobs:
        folders.setdefault(job.folder, []).append((job, set(job.todo)))
    lanes, cuts = list(folders.values()), {id(job): windows(job.samples, turn) for job in jobs}
    return [
        Task(window, job, index, place)
        for window in range(max(map(len, cuts.values())))
        for place in range(len(lanes))
        for job, todo in lanes[(window + place) % len(lanes)]
        for index in (cuts[id(job)][window] if window < len(cuts[id(job)]) else ())
        if index in todo
    ]


def walk(tasks: Sequence[Task], readings: Readings) -> Iterator[tuple[Task, Callable[[], None]]]:
    """Yield each task with a function that starts to read the next unread sample.

    Drops all readings at the start of each window.
    """
    window = -1

    def read_next(at: int) -> None:
        for task in islice(tasks, at + 1, None):
            job, index = task.job, task.index
            if index in job.todo and (key := job.key(index)) not in readings:
                readings.begin(key, job.read(index), job.cfg.threads)
                return

    for at, task in enumerate(tasks):
        if task.window != window:
            window = task.window
            readings.forget()
        yield task, partial(read_next, at)


def share_ranks(cfg: RunConfig, folder: Path) -> int:
    """Run one job on all ranks of torchrun; rank 0 writes. Returns the exit code."""
    with Readings() as readings, joined(places_of(cfg).first) as ranks:
        job = Job(cfg, folder if ranks.rank == 0 else None, folder, ModelCache(), ranks)
        job.start()
        try:
            for task, read_next in walk(schedule([job], 1), readings):
                job.turn(task.index, readings, 0, read_next)
        finally:
            code = job.close()
    return code


def _turn(task: Task, readings: Readings, read_next: Callable[[], None], tell: Callable[[Exception], int]) -> int:
    """Answer one sample. An error that is not noted in a row ends the sample's job. Returns the exit code."""
    job = task.job
    try:
        with contained():
            job.turn(task.index, readings, task.place, read_next)
    except FATAL:
        raise
    except Exception as error:
        job.fail(error)
        code = tell(error)
        if job.cfg.fail_fast:
            raise JobFailed(code) from error
        return code
    return ExitCode.OK
