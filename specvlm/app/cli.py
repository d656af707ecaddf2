"""What every command line of specvlm has in common: mistakes become a line and an exit code, and a rank leaves in time."""

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from time import sleep
from typing import NoReturn

from specvlm.app.terminal import loading
from specvlm.errors import ExitCode, JobFailed, Told, UserError, message, visible
from specvlm.parallel import torchrun

AFTER_YOU_S = 5.0  # torchrun ends all ranks when one ends


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
