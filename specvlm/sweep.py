"""The jobs over samples of one call: they take turns, a few samples each, over models that are loaded once."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig

from specvlm import names
from specvlm.compose import FOLDERS
from specvlm.errors import ExitCode, JobFailed, UserError, worst
from specvlm.held import HELD, Held
from specvlm.job import Job
from specvlm.metrics import MEANS, totals
from specvlm.places import places_of
from specvlm.prepare import Reading
from specvlm.ranks import joined
from specvlm.rows import CannotWrite, Taken, config_of, rows_of, summary_of
from specvlm.show import Screen
from specvlm.tracker import Tracker, Wandb, sync_line

END_IT = (JobFailed, CannotWrite, Taken, BrokenPipeError)  # what is no single job's affair


class Sweep:
    """Jobs as Hydra starts them. In this process they wait for each other, and take turns; in another, and under a sweeper that
    wants to see what comes out, each is done at once.

    folder: of all of them; None where Hydra decides it. labels: by the folder of each job. tracker: the configuration's word on
    it. tell: says what a job failed of, and returns its exit code.
    """

    def __init__(self, folder: Path | None, labels: Mapping[Path, str], tracker: Any, tell: Callable[[Exception], int]) -> None:
        self.folder, self.tracker, self.tell, self.home = folder, tracker, tell, os.getpid()
        short, self.common = names.apart(list(labels.values())) if labels else ([], "")
        self.labels = dict(zip(labels, short, strict=True))
        presets = [word.partition("=")[2] for word in self.common.split(" ") if word.startswith("experiment=")]
        self.name = " ".join([*presets, folder.name if folder else ""]).strip()
        self.wandb: Wandb | None = None
        self.jobs: list[Job] = []
        self.failures: dict[Path, dict[str, Any]] = {}  # of jobs that could not begin
        self.begun: list[tuple[Job, str]] = []  # in this process, each with the option that names the folder
        self.ended: Exception | None = None  # by what is no single job's affair, before the jobs began

    def add(self, cfg: DictConfig, folder: Path, hydra: Any) -> int:
        """hydra: its own part of the configuration. Returns the exit code, as far as it is known."""
        if self.ended:
            return ExitCode.OK
        try:
            return self._add(cfg, folder, hydra)
        except (*END_IT, UserError) as error:
            if os.getpid() != self.home:
                return self.tell(error)
            self.ended = error  # said later: Hydra would say it in its own way
            return ExitCode.OK

    def _add(self, cfg: DictConfig, folder: Path, hydra: Any) -> int:
        several = hydra.mode == RunMode.MULTIRUN
        above = self.folder if several and self.folder else folder
        if places_of(cfg).ranks > 1:
            try:
                return share_ranks(cfg, folder)
            except Exception as error:
                return self.tell(error)
        label = self.labels.get(folder, "") if self.labels else names.label(hydra.overrides.task)
        job = Job(cfg, folder, above, HELD, label=label, group=self.name, wandb=self._wandb())
        try:
            job.start()
        except END_IT:
            raise
        except Exception as error:
            self.failures[folder] = job.fail(error)
            code = self.tell(error)
            if cfg.fail_fast:
                raise JobFailed(code) from error
            return code
        self.begun.append((job, FOLDERS[several]))
        plain = (hydra.launcher._target_.endswith(".BasicLauncher"), hydra.sweeper._target_.endswith(".BasicSweeper"))
        if several and all(plain) and self.labels and os.getpid() == self.home:
            self.jobs.append(job)
            return ExitCode.OK
        return take_turns([job], cfg.turn, self.tell)

    def _wandb(self) -> Wandb | None:
        if self.wandb is None and self.tracker is not None:
            self.wandb = Wandb(self.tracker, Screen().note)
        return self.wandb

    def finish(self) -> int:
        """Do what waits; returns the worst exit code."""
        if self.ended:
            raise self.ended
        return take_turns(self.jobs, self.jobs[0].cfg.turn, self.tell) if self.jobs else ExitCode.OK

    def mismatch(self) -> list[int]:
        """Its exit code where a job has one, of what is in their folders."""
        wrong = any("MISMATCH" in summary_of(folder).get("verdicts", {}) for folder in self.labels)
        return [ExitCode.MISMATCH] if wrong else []

    def close(self) -> None:
        """Let go of what was not begun."""
        for job in self.jobs:
            with suppress(CannotWrite):
                job.close()

    def show(self) -> None:
        """The table of jobs, as far as they came, and the tracker's picture of it; nothing where none began."""
        if self.ended:
            return
        screen, never = Screen(), {"status": "failed", "reason": "it never began"}
        found = {folder: self._state_of(folder) for folder in self.labels}
        if not any(found.values()):
            return
        told = [(label, found[folder] or never) for folder, label in self.labels.items()]
        unfinished = [option for job, option in self.begun if job.todo]
        go_on = f"resume=true {shlex.quote(f'{unfinished[0]}={self.folder}')}" if unfinished and self.folder else ""
        screen.jobs(told, self.common, self.folder, go_on)
        if self.tracker is not None and self.folder:
            if len(found) > 1:
                tracker = Tracker(self._wandb())
                tracker.begin(f"{self.name}: all jobs", self.name, self.folder, {"jobs": list(self.labels.values())}, "sweep")
                tracker.plots([self._point(folder, found[folder]) for folder in found if "samples" in found[folder]])
            screen.note(sync_line(self.folder))

    def _point(self, folder: Path, found: dict[str, Any]) -> dict[str, Any]:
        """A job's line of the tracker's table."""
        cfg = config_of(folder)
        chosen = {kind: cfg[kind]["name"] for kind in ("pruner", "drafter", "verifier", "dataset")}
        figures = {key: found[key] for key in (*MEANS, "speedup_decode", "speedup_end_to_end", "ok", "failed", "skipped")}
        return {"job": self.labels[folder]} | chosen | {key: cfg[key] for key in ("ratio", "frames", "seed")} | figures

    def _state_of(self, folder: Path) -> dict[str, Any]:
        return self.failures.get(folder) or summary_of(folder) or (totals(rows, len(rows)) if (rows := rows_of(folder)) else {})


def take_turns(jobs: Sequence[Job], turn: int, tell: Callable[[Exception], int]) -> int:
    """Every job to its end; returns the worst exit code. turn: samples that a job answers before it is the next one's turn.

    Behind each turn the order moves on by one, so that no job always comes first, or behind the same other one. It goes by the
    samples' places in the data set: whether a sweep was broken off, or split into shards, makes no difference. Shards of one
    configuration have one place. Jobs of another target come when those of the first are through. tell: says what a whole job
    failed of, and returns its exit code; the others go on.
    """
    codes, groups = list[int](), dict[Any, list[Job]]()
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
    return worst(codes)


def share_ranks(cfg: DictConfig, folder: Path) -> int:
    """One job on all ranks that torchrun started, of which the first one writes; returns the exit code."""
    with joined(places_of(cfg).first) as ranks:
        job = Job(cfg, folder if ranks.rank == 0 else None, folder, Held(), ranks)
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
    return ExitCode.OK
