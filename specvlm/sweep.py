"""The jobs over samples of one call: they take turns, a few samples each, over models that are loaded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig

from specvlm import names
from specvlm.errors import JobFailed
from specvlm.held import HELD, Held
from specvlm.job import Job
from specvlm.metrics import totals
from specvlm.places import places_of
from specvlm.prepare import Reading
from specvlm.ranks import joined
from specvlm.rows import CannotWrite, Taken, rows_of, summary_of
from specvlm.show import Screen

END_IT = (JobFailed, CannotWrite, Taken, BrokenPipeError)  # what is no single job's affair


class Sweep:
    """Jobs as Hydra starts them. In this process they wait for each other, and take turns; in another, and under a sweeper that
    wants to see what comes out, each is done at once.

    folder: of all of them; None where Hydra decides it. labels: by the folder of each job. tell: says what a job failed of, and
    returns its exit code.
    """

    def __init__(self, folder: Path | None, labels: Mapping[Path, str], tell: Callable[[Exception], int]) -> None:
        self.folder, self.tell, self.home = folder, tell, os.getpid()
        short, self.common = names.apart(list(labels.values())) if labels else ([], "")
        self.labels = dict(zip(labels, short, strict=True))
        self.jobs: list[Job] = []
        self.failures: dict[Path, str] = {}
        self.ended: Exception | None = None  # by what is no single job's affair, before the jobs began

    def add(self, cfg: DictConfig, folder: Path, hydra: Any) -> int:
        """hydra: its own part of the configuration. Returns the exit code, as far as it is known."""
        if self.ended:
            return 0
        try:
            return self._add(cfg, folder, hydra)
        except END_IT as error:
            if os.getpid() != self.home:
                return self.tell(error)
            self.ended = error  # said later: Hydra would say it in its own way
            return 0

    def _add(self, cfg: DictConfig, folder: Path, hydra: Any) -> int:
        several = hydra.mode == RunMode.MULTIRUN
        above = self.folder if several and self.folder else folder
        baselines = Path(cfg.baselines).expanduser() if cfg.baselines else above / "baselines"
        if places_of(cfg).ranks > 1:
            return share_ranks(cfg, folder, baselines)
        job = Job(cfg, folder, baselines, HELD, label=self.labels.get(folder, ""))
        try:
            job.start()
        except END_IT:
            raise
        except Exception as error:
            job.fail(error)
            self.failures[folder] = job.failure
            code = self.tell(error)
            if cfg.fail_fast:
                raise JobFailed(code) from error
            return code
        plain = (hydra.launcher._target_.endswith(".BasicLauncher"), hydra.sweeper._target_.endswith(".BasicSweeper"))
        if several and all(plain) and os.getpid() == self.home:
            self.jobs.append(job)
            return 0
        return take_turns([job], cfg.turn, self.tell)

    def finish(self) -> int:
        """Do what waits; returns the highest exit code."""
        if self.ended:
            raise self.ended
        return take_turns(self.jobs, self.jobs[0].cfg.turn, self.tell) if self.jobs else 0

    def close(self) -> None:
        """Let go of what was not begun."""
        for job in self.jobs:
            with suppress(CannotWrite):
                job.close()

    def show(self) -> None:
        """The table of jobs, as far as they came; none where none began."""
        if not self.ended and any(map(self._state_of, self.labels)):
            never = {"status": "failed", "reason": "it never began"}
            Screen().jobs([(label, self._state_of(folder) or never) for folder, label in self.labels.items()], self.common)

    def _state_of(self, folder: Path) -> dict[str, Any]:
        if folder in self.failures:
            return {"status": "failed", "reason": self.failures[folder]}
        return summary_of(folder) or (totals(rows, len(rows)) if (rows := rows_of(folder)) else {})


def take_turns(jobs: Sequence[Job], turn: int, tell: Callable[[Exception], int]) -> int:
    """Every job to its end; returns the highest exit code. turn: samples that a job answers before it is the next one's turn.

    Behind each turn the order moves on by one, so that no job always comes first, or behind the same other one. It goes by the
    samples' places in the data set: whether a sweep was broken off, or split into shards, makes no difference. Shards of one
    configuration have one place. Jobs of another target come when those of the first are through. tell: says what a whole job
    failed of, and returns its exit code; the others go on.
    """
    codes, groups = [0], dict[Any, list[Job]]()
    for job in jobs:
        groups.setdefault(job.held.target_of(job.setup), []).append(job)
    try:
        for group in groups.values():
            lanes = dict[Any, list[Job]]()
            for job in group:
                lanes.setdefault(job.folder, []).append(job)
            for number, first in enumerate(range(0, max(len(job.samples) for job in group), turn)):
                readings: dict[Any, Reading] = {}
                for place in range(len(lanes)):
                    for job in list(lanes.values())[(number + place) % len(lanes)]:
                        codes.append(_turn(job, range(first, first + turn), readings, place, tell))
            codes += [job.close() for job in group]
    finally:
        for job in jobs:
            with suppress(CannotWrite):  # which has been said
                job.close()
    return max(codes)


def share_ranks(cfg: DictConfig, folder: Path, baselines: Path) -> int:
    """One job on all ranks that torchrun started, of which the first one writes; returns the exit code."""
    with joined(places_of(cfg).first) as ranks:
        job = Job(cfg, folder if ranks.rank == 0 else None, baselines, Held(), ranks)
        job.start()
        try:
            for index in range(len(job.samples)):
                job.turn([index], {}, 0)
        finally:
            code = job.close()
    return code


def _turn(job: Job, indices: range, readings: dict[Any, Reading], place: int, tell: Callable[[Exception], int]) -> int:
    try:
        job.turn(indices, readings, place)
    except END_IT:
        raise
    except Exception as error:
        job.fail(error)
        code = tell(error)
        if job.cfg.fail_fast:
            raise JobFailed(code) from error
        return code
    return 0
