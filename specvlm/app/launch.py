"""Compose and check all jobs of a command line before any starts, and have Hydra run them."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from specvlm.app import compose, job_names
from specvlm.app.compose import Job
from specvlm.app.console import left
from specvlm.app.quoting import FOLDERS, quoted
from specvlm.app.sweep import Sweep
from specvlm.config import RunConfig
from specvlm.errors import ExitCode, JobFailed, UserError, visible, worst
from specvlm.parallel import torchrun
from specvlm.results.rows import CannotWrite

TURNS = "hydra_plugins.specvlm_launcher.TurnsLauncher"  # the launcher that runs every sweep
RAYS = "hydra_plugins.hydra_ray_launcher"  # the package behind conf/hydra/launcher/ray.yaml


class Call:
    """Runs the jobs of one command line. An instance is also Hydra's task function, called by Hydra's launchers.

    Some launchers call it in other processes.

    Args:
        folder: Folder of the run or the sweep.
        key: Key with which the user could set this folder; empty if the user has set it.
        guarded: Calls a function and turns its errors into an exit code.
        tell: Reports an error and returns its exit code.
    """

    def __init__(
        self, folder: Path, key: str, guarded: Callable[[Callable[[], int]], int], tell: Callable[[Exception], int]
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        # The folder, or its nearest parent that existed before this call.
        self.there_before = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        self.key, self.guarded, self.tell, self.home = key, guarded, tell, os.getpid()
        self.codes: list[int] = []
        self.jobs, self.began = 0, monotonic()
        self.sweep = Sweep(self.folder, tell)

    def expect(self, jobs: Sequence[Job]) -> None:
        """Register jobs that are about to start.

        Raises UserError for resume=true if the user gave no folder and the default one does not exist.
        """
        if jobs[0].cfg.resume and self.key and self.there_before != self.folder:
            raise UserError(f"resume=true needs an existing folder: give {self.key}=FOLDER")
        self.jobs += len(jobs)
        inner = {Path(os.path.abspath(self.folder / job.folder)): job.label for job in jobs if job.folder is not None}
        self.sweep.expect(inner, jobs[0].cfg.tracker)

    def take_turns(self, jobs: Sequence[tuple[Job, DictConfig]], context: HydraContext) -> list[JobReturn]:
        """Run the jobs of a sweep in this process: first each run of one video, then the jobs over samples in turns."""
        self.sweep.together = True
        done = [
            run_job(partial(self.checked, job.cfg), cfg, "hydra.sweep.dir", "hydra.sweep.subdir", context) for job, cfg in jobs
        ]
        self.codes.append(self.sweep.finish())
        return done

    def __call__(self, cfg: DictConfig) -> int:
        """Check and run one job, for launchers other than ours. Returns its exit code, or raises JobFailed (`_job`)."""
        return self._job(cfg.get("dataset") is not None, bool(cfg.get("fail_fast")), lambda: compose.frozen(cfg))

    def checked(self, run: RunConfig, cfg: DictConfig) -> int:
        """Run one job that was checked already, or add it to the sweep; returns its exit code. cfg: not used."""
        return self._job(run.dataset is not None, run.fail_fast, lambda: run)

    def _job(self, sampled: bool, fail_fast: bool, asked: Callable[[], RunConfig]) -> int:
        """Run one job in the folder that Hydra gave it, or add it to the sweep; returns its exit code.

        Args:
            sampled: Whether the job has a data set.
            fail_fast: Whether to skip the job if an earlier one had a non-zero exit code.
            asked: Returns the checked configuration.

        Raises:
            JobFailed: The job's exit code is not 0, and this is not the process that parsed the command line.
        """
        state = HydraConfig.get()
        folder = Path(state.runtime.output_dir)
        if any(self.codes) and fail_fast:
            return ExitCode.OK
        if state.mode == RunMode.MULTIRUN and not sampled:
            done = len(self.codes)
            rest = left(done, self.jobs - done, self.began)
            print(visible(f"[{state.job.num + 1}/{self.jobs}] {' '.join(state.overrides.task)}{rest}"), flush=True)
            self.sweep.expect({folder: job_names.label(state.overrides.task)}, self.sweep.tracker)
        if torchrun.rank_here():
            self.tidy(folder)  # also before the job: a rank that is killed cannot tidy afterwards
        try:
            code = self.sweep.add(asked(), folder, state) if sampled else self.guarded(lambda: _run(asked(), folder))
        finally:
            self.tidy(folder)
        if code and os.getpid() != self.home:
            raise JobFailed(code)
        self.codes.append(code)
        return code

    def tidy(self, folder: Path) -> None:
        """Remove `folder` and the parents that were made for it, up to the first one that is not empty."""
        while self.there_before in folder.parents:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
            folder = folder.parent

    def tidy_sweep(self) -> None:
        """Remove the sweep's folder if this call made it and it holds nothing but Hydra's multirun.yaml."""
        ours = self.folder != self.there_before and self.folder.is_dir()
        if ours and [path.name for path in self.folder.iterdir()] == ["multirun.yaml"]:
            (self.folder / "multirun.yaml").unlink()
        self.tidy(self.folder)

    def carry_out(self, action: Callable[[], object]) -> int:
        """Call `action`, which starts the jobs, then finish the sweep. Returns the worst exit code.

        A JobFailed becomes an exit code here if jobs are registered, and so does a CannotWrite if an output is wrong:
        then the code must be MISMATCH. Other errors are raised; a full disk becomes a UserError.
        """
        try:
            action()
            self.codes.append(self.sweep.finish())
        except (JobFailed, CannotWrite) as err:  # the first error, perhaps of a worker process
            if not self.sweep.labels or (isinstance(err, CannotWrite) and not self.sweep.mismatch()):
                raise
            self.codes += [self.tell(err), *self.sweep.mismatch()]
        except OSError as err:
            if err.filename or isinstance(err, HydraException | BrokenPipeError):
                raise
            raise UserError(f"{err}: cannot write into {self.folder}") from err  # the error of a full disk names no file
        finally:
            self.sweep.close()
            self.tidy_sweep()
            self.sweep.show()
        return worst(self.codes)


def answer(args: Namespace, parser: ArgumentParser) -> int:
    """Have Hydra answer --hydra-help, --cfg, --shell-completion or --info. Call inside `compose.hydra`."""
    hydra, name, words = cast("Any", GlobalHydra.instance().hydra), args.config_name or "config", args.overrides
    if args.hydra_help:
        hydra.hydra_help(name, parser, args)
    elif args.cfg:
        hydra.show_cfg(name, words, args.cfg, args.package, args.resolve)
    elif args.shell_completion:
        hydra.shell_completion(name, words)
    else:
        hydra.show_info(args.info, name, words)
    return ExitCode.OK


def start(words: Sequence[str], sweep: bool, call_of: Callable[[Path, str], Call], name: str = "config") -> int:
    """Compose, check and run the jobs of `words`; returns the exit code. Call inside `compose.hydra`.

    Args:
        words: Overrides, quoted for Hydra.
        sweep: Whether -m was given.
        call_of: Makes a Call from its `folder` and `key`.
        name: Name of the primary configuration.

    Raises:
        UserError: An override is wrong, or the jobs that the words ask for cannot run.
    """
    key, other = FOLDERS[sweep], FOLDERS[not sweep]
    if any(word.startswith(f"{other}=") for word in words):
        whose = "of a run, and -m starts a sweep" if sweep else "of a sweep, which -m starts"
        raise UserError(f"{other} is the folder {whose}: give {key}=FOLDER")
    mode, loader = RunMode.MULTIRUN if sweep else RunMode.RUN, GlobalHydra.instance().config_loader()
    cfg = compose.composed([*words, f"hydra.mode={mode.name}"], mode, name)
    context = HydraContext(loader, Callbacks(cfg))
    unnamed = "" if any(word.startswith(f"{key}=") for word in words) else key
    if sweep:
        call = call_of(Path(cfg.hydra.sweep.dir), unnamed)
        return call.carry_out(lambda: _sweep(cfg, call, context))
    job = compose.job_of(cfg, sweep)
    call = call_of(torchrun.nowhere() or job.run_dir, unnamed)
    cfg.hydra.run.dir = str(call.folder)
    call.expect([job])
    return call.carry_out(lambda: _once(cfg, partial(call.checked, job.cfg), context))


def _once(cfg: DictConfig, task: Callable[[DictConfig], int], context: HydraContext) -> None:
    """Run the only job, with Hydra's callbacks. Raises what the job raises."""
    context.callbacks.on_run_start(config=cfg, config_name=cfg.hydra.job.config_name)
    done = run_job(task, cfg, "hydra.run.dir", None, context)
    context.callbacks.on_run_end(config=cfg, config_name=cfg.hydra.job.config_name, job_return=done)
    _ = done.return_value  # raises the job's exception


def _sweep(cfg: DictConfig, call: Call, context: HydraContext) -> None:
    """Have Hydra's sweeper list the jobs and our launcher run them, with Hydra's callbacks."""
    written = call.folder / "multirun.yaml"
    if written.exists() and not written.is_file():  # Hydra would block on a pipe
        raise UserError(f"{written} is not a file: move it away, or give another folder")
    over = None if compose.is_basic(cfg.hydra.launcher) else cfg.hydra.launcher
    if over is not None and str(over.get("_target_", "")).startswith(RAYS) and not (find_spec(RAYS) and find_spec("ray")):
        how = 'pip install "specvlm[ray]", then pip install --no-deps hydra-ray-launcher'
        raise UserError(f"hydra/launcher=ray is not installed: {how}")
    with open_dict(cfg):
        cfg.hydra.sweep.dir = str(call.folder)  # one folder for all jobs: ${now} differs from job to job
        cfg.hydra.overrides.hydra += quoted([f"{FOLDERS[True]}={call.folder}"], sweep=False)
        cfg.hydra.launcher = OmegaConf.create({"_target_": TURNS, "_recursive_": False, "over": over})
    context.callbacks.on_multirun_start(config=cfg, config_name=cfg.hydra.job.config_name)
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=call, config=cfg)
    sweeper.validate_batch_is_legal = lambda batch: None  # type: ignore[method-assign]  # our launcher composes and checks the jobs
    sweeper.sweep(list(cfg.hydra.overrides.task))
    context.callbacks.on_multirun_end(config=cfg, config_name=cfg.hydra.job.config_name)


def _run(cfg: RunConfig, folder: Path) -> int:
    from specvlm.app.run import run

    return run(cfg, folder)
