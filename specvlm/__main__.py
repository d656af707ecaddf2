"""`python -m specvlm`: one run, or with -m a sweep.

Exit codes (`errors.ExitCode`): 0 the output is the target's own, 1 MISMATCH, 2 the caller's mistake (one line says which), 3 a
fault of specvlm (with its traceback), 4 another rank died, 5 samples failed (the table says which; all others are done), 130
Ctrl-C. A sweep ends with 1 where any output was wrong, whatever else happened, else with the highest of its jobs'. Those are a
rank's: torchrun itself ends with 1 for any of them but 0.
HYDRA_FULL_ERROR=1 shows the traceback of mistakes too.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, NoReturn

from specvlm import torchrun
from specvlm.errors import ExitCode, JobFailed, Told, UserError, message, visible, worst
from specvlm.interrupts import INTERRUPTS

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

    from specvlm.compose import Job
    from specvlm.config import RunConfig
    from specvlm.sweep import Sweep

AFTER_YOU_S = 5.0  # torchrun ends all ranks when one ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    full = full_errors()
    for name in ("stdout", "stderr"):  # a shell may have closed them
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if torchrun.rank_here():  # the first rank speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with INTERRUPTS.listening():
        try:
            return guarded(lambda: command(list(sys.argv[1:] if argv is None else argv), full))
        except KeyboardInterrupt as interrupt:
            if not torchrun.rank_here():
                where = next((f" {note}" for note in getattr(interrupt, "__notes__", []) if note), "")
                print(visible(f"specvlm: interrupted{where}"), file=sys.stderr)
            return ExitCode.INTERRUPTED


def guarded(action: Callable[[], int], full: bool | None = None) -> int:
    """Call `action`; a mistake becomes one line on stderr and its exit code. full: with its traceback; None: as the
    environment has it.
    """
    full = full_errors() if full is None else full
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without the letter shows what stands for it
            stream.reconfigure(errors="backslashreplace")
    try:
        code = action()
        sys.stdout.flush()  # now: what reads it may be gone
        return code
    except Exception as err:
        return tell(err, full)


def full_errors() -> bool:
    """Are tracebacks of mistakes to be shown?"""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def tell(err: Exception, full: bool) -> int:
    """Say what went wrong, on stderr; returns the exit code."""
    if isinstance(err, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        return ExitCode.PIPE_CLOSED
    if isinstance(err, UserError | OSError):
        if full:
            traceback.print_exception(err)
        if torchrun.rank_here():  # the first rank says it
            sleep(0 if isinstance(err, Told) else AFTER_YOU_S)
        else:
            print(f"specvlm: {message(err)}", file=sys.stderr)
        return ExitCode.MISTAKE
    if isinstance(err, JobFailed):
        return err.code
    traceback.print_exception(err)
    if not torchrun.rank_here():
        print("specvlm: this is a fault of specvlm or of a plugin, not of the command line", file=sys.stderr)
    return ExitCode.FAULT


def command(argv: list[str], full: bool) -> int:
    """Check every job, then let Hydra run them."""
    from hydra._internal.utils import get_args_parser

    from specvlm import compose, metrics

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    if "--version" in argv:
        print(f"specvlm {metrics.versions()['specvlm']}")
        return ExitCode.OK
    from specvlm.integrity import CODE  # and torch with it
    from specvlm.plugins import BUILTINS

    args = parser.parse_intermixed_args(argv)
    argv = options_first(argv, args.overrides)
    sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if sweep and torchrun.size_here() > 1:
        raise UserError("a sweep does not run under torchrun: start torchrun once a job")
    words = compose.quoted(argv, sweep)
    if runs(args):  # all that is to stay as it is, before a plugin is imported
        for module in ("specvlm.sweep", "specvlm.run", *BUILTINS):
            importlib.import_module(module)
    with CODE.watching(), compose.explained():
        compose.register()
        if not runs(args):
            return launch(words, Plan([], None), full)
        extra = Path(args.config_dir) if args.config_dir else None
        planned = compose.jobs(compose.quoted(args.overrides, sweep), sweep, extra)
        here = planned[0].sweep_dir if sweep else planned[0].run_dir
        plan = Plan(planned, torchrun.nowhere() or here)
        written = here / "multirun.yaml"
        if sweep and written.exists() and not written.is_file():  # Hydra would wait for a pipe's reader
            raise UserError(f"{written} is no file: move it away, or give another folder")
        key, other = compose.FOLDERS[sweep], compose.FOLDERS[not sweep]
        if any(word.startswith(f"{other}=") for word in words):
            whose = "of a run, and -m starts a sweep" if sweep else "of a sweep, which -m starts"
            raise UserError(f"{other} is the folder {whose}: give {key}=FOLDER")
        if planned[0].cfg.resume and not here.is_dir() and not any(word.startswith(f"{key}=") for word in words):
            raise UserError(f"resume=true goes on in a folder that is there: give {key}=FOLDER")
        return launch([*words, *compose.quoted([f"{key}={plan.folder}"], sweep=False)], plan, full)


def options_first(argv: list[str], overrides: list[str]) -> list[str]:
    """Hydra takes no word behind an option that stands behind other words, and we add one at the end."""
    left, options = list(overrides), []
    for word in argv:
        if left and word == left[0]:
            left.pop(0)
        else:
            options.append(word)
    return [*options, *overrides]


def runs(args: argparse.Namespace) -> bool:
    """Is this a run of the usual configuration, and not a question about it?"""
    asks = (args.help, args.hydra_help, args.cfg, args.info, args.shell_completion, args.experimental_rerun)
    return not any(asks) and not args.config_name and not args.config_path


class Plan:
    """What is about to run: the jobs, where they are known, and where they write. `folder` is None where Hydra decides that."""

    def __init__(self, jobs: Sequence[Job], folder: Path | None) -> None:
        self.jobs = jobs
        self.folder = Path(os.path.abspath(folder)) if folder else None
        places = [self.folder, *self.folder.parents] if self.folder else []
        self.there_before = next((place for place in places if place.exists()), None)

    @property
    def labels(self) -> dict[Path, str]:
        """What the jobs over samples are called, by their folders."""
        inner = {job.folder: job.label for job in self.jobs if job.folder is not None}
        return {Path(os.path.abspath(self.folder / folder)): label for folder, label in inner.items()} if self.folder else {}

    def tidy(self, folder: Path) -> None:
        """Remove `folder`, and what was made to hold it, where nothing was written."""
        while self.there_before in folder.parents:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
            folder = folder.parent

    def tidy_sweep(self) -> None:
        """Hydra writes multirun.yaml before the first job; without a job's folder beside it, it says nothing."""
        if self.folder is None:
            return
        ours = self.folder != self.there_before and self.folder.is_dir()
        if ours and [path.name for path in self.folder.iterdir()] == ["multirun.yaml"]:
            (self.folder / "multirun.yaml").unlink()
        self.tidy(self.folder)


def launch(words: list[str], plan: Plan, full: bool) -> int:
    """Run the jobs through Hydra; returns the worst exit code."""
    import hydra
    from hydra.errors import HydraException

    from specvlm import config
    from specvlm.compose import frozen
    from specvlm.rows import CannotWrite

    home = os.getpid()
    codes: list[int] = []
    sweep = over_samples(plan, full) if plan.labels else None

    def job(cfg: DictConfig) -> int:
        from hydra.core.hydra_config import HydraConfig

        state = HydraConfig.get()
        folder = Path(state.runtime.output_dir)
        sampled = cfg.get("dataset") is not None
        if any(codes) and cfg.get("fail_fast"):
            return ExitCode.OK
        if len(plan.jobs) > 1 and not sampled:
            print(visible(f"[{state.job.num + 1}/{len(plan.jobs)}] {' '.join(state.overrides.task)}"), flush=True)
        if torchrun.rank_here():
            plan.tidy(folder)  # now, since a rank may be killed
        try:
            code = (
                sweep.add(frozen(cfg), folder, state) if sweep and sampled else guarded(lambda: one(cfg, folder, state), full)
            )
        finally:
            plan.tidy(folder)
        if code and os.getpid() != home:
            raise JobFailed(code)
        codes.append(code)
        return code

    def one(raw: DictConfig, folder: Path, state: HydraConf) -> int:
        cfg = frozen(raw)
        if cfg.dataset is None:
            return _run(cfg, folder)
        alone = over_samples(plan, full)
        return worst([alone.add(cfg, folder, state), alone.finish()])

    try:
        with _hydra_raises(words):
            hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")(job)()
        if sweep:
            codes.append(sweep.finish())
    except (JobFailed, CannotWrite) as err:  # it may have come from a worker, as the first of several that failed
        if sweep is None or (isinstance(err, CannotWrite) and not sweep.mismatch()):
            raise
        codes += [tell(err, full), *sweep.mismatch()]
    except OSError as err:
        if err.filename or isinstance(err, HydraException | BrokenPipeError):
            raise
        raise UserError(f"{err}: cannot write into {plan.folder}") from err  # a full disk does not say where
    finally:
        if sweep:
            sweep.close()
        plan.tidy_sweep()
        if sweep:
            sweep.show()
    return worst(codes)


def over_samples(plan: Plan, full: bool) -> Sweep:
    """What handles jobs over the samples of a data set."""
    from specvlm.sweep import Sweep

    tracker = plan.jobs[0].cfg.tracker if plan.jobs else None
    return Sweep(plan.folder, plan.labels, tracker, partial(tell, full=full))


def _run(cfg: RunConfig, folder: Path) -> int:
    from specvlm.run import run

    return run(cfg, folder)


@contextmanager
def _hydra_raises(words: list[str]) -> Iterator[None]:
    """Let Hydra read `words`, and raise its errors instead of printing them and exiting with 1."""
    argv, before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def refuse(message: str) -> NoReturn:
    """What an ArgumentParser's `error` is replaced by: one line, without its usage. Raises UserError."""
    raise UserError(f"{message}; --help shows what there is")


def leave(action: Callable[[], int]) -> NoReturn:
    """Out of the process with the exit code that `action` returns, as `sys.exit`."""
    try:
        code = action()
    except SystemExit as err:  # rich's, where nobody reads any more
        code = err.code if isinstance(err.code, int) else int(err.code is not None)
    if code and torchrun.size_here() > 1:  # a collective that nobody answers would keep the interpreter from ending
        with suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main)
