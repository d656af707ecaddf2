"""`python -m specvlm`: one run, or with -m a sweep.

Exit codes (`errors.ExitCode`): 0 the output is the target's own, 1 MISMATCH, 2 the caller's mistake (one line says which), 3 a
fault of specvlm (with its traceback), 4 another rank died, 5 samples failed (the table says which; all others are done), 130
Ctrl-C. A sweep ends with 1 where any output was wrong, whatever else happened, else with the highest of its jobs'. Those are a
rank's: torchrun itself ends with 1 for any of them but 0.
HYDRA_FULL_ERROR=1 shows the traceback of mistakes too.
"""

import importlib
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from time import sleep
from typing import NoReturn

from specvlm import manual, metrics, torchrun
from specvlm.errors import ExitCode, JobFailed, Told, UserError, message, visible
from specvlm.interrupts import INTERRUPTS
from specvlm.terminal import loading

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
    """Call `action`; a mistake becomes a line on stderr and an exit code. full: with its traceback; None: `full_errors`."""
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
    if "--version" in argv:
        print(f"specvlm {metrics.versions()['specvlm']}")
        return ExitCode.OK
    if {"-h", "--help"}.intersection(argv):
        manual.show([word for word in argv if not word.startswith("-")])
        return ExitCode.OK
    loading()
    from hydra._internal.utils import get_args_parser

    from specvlm import compose
    from specvlm.integrity import CODE  # and torch with it
    from specvlm.launch import Call, answer, start
    from specvlm.plugins import BUILTINS

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun:
        refuse("--experimental-rerun: a run is started again by its words")
    sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if sweep and torchrun.size_here() > 1:
        raise UserError("a sweep does not run under torchrun: start torchrun once a job")
    args.overrides = compose.quoted(args.overrides, sweep)
    asks = any((args.hydra_help, args.cfg, args.info, args.shell_completion))
    if not asks:  # all that is to stay as it is, before a plugin is imported
        for module in ("specvlm.sweep", "specvlm.run", *BUILTINS):
            importlib.import_module(module)
    more, main_folder = (Path(args.config_dir) if args.config_dir else None), Path(__file__).parent / (args.config_path or "")
    with CODE.watching(), compose.hydra(more, main_folder if args.config_path else None):
        args.overrides += compose.searchpath(more)
        if asks:
            return answer(args, parser)
        call_of = partial(Call, guarded=partial(guarded, full=full), tell=partial(tell, full=full))
        return start(args.overrides, sweep, call_of, args.config_name or "config")


def refuse(message: str) -> NoReturn:
    """What an ArgumentParser's `error` is replaced by: one line, without its usage. Raises UserError."""
    raise UserError(f"{message}; --help shows what there is")


def print_lines(parser: ArgumentParser, words: Sequence[str] | None, made: Callable[[Namespace], Sequence[str]]) -> int:
    """The command line of a tool that prints what is `made` of its arguments; returns the exit code."""
    parser.error = refuse  # type: ignore[method-assign]

    def action() -> int:
        args = parser.parse_args(words)
        loading()
        for line in made(args):
            print(visible(line))
        return ExitCode.OK

    return guarded(action)


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
