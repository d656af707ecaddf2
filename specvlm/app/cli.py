"""What all command lines share: report errors, turn them into exit codes, and end a failed rank without cleanup."""

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

# Seconds that a failed rank other than 0 waits before it exits. torchrun ends all ranks when one fails, so this leaves
# rank 0 the time to report the error.
AFTER_YOU_S = 5.0


def guarded(action: Callable[[], int], full: bool | None = None) -> int:
    """Call `action` and return its exit code. Handles its exceptions as `tell` does, but not Ctrl-C and SystemExit.

    Args:
        action: Returns an exit code.
        full: Print tracebacks of user errors too. None: only if HYDRA_FULL_ERROR=1 is set.
    """
    full = full_errors() if full is None else full
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # escape characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = action()
        sys.stdout.flush()  # raises here, not at exit, if the reader of a pipe is gone
        return code
    except Exception as err:
        return tell(err, full)


def run_command(argv: Sequence[str] | None, show_help: Callable[[], None], command: Callable[[list[str]], int]) -> int:
    """Run a command that takes overrides of a run, or show its help; returns the exit code.

    Args:
        argv: Arguments of the command; None takes them from sys.argv.
        show_help: Prints the help.
        command: Takes the words and returns an exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(words):
        show_help()
        return ExitCode.OK
    try:
        return guarded(lambda: command(words))
    except KeyboardInterrupt:
        print("specvlm: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def full_errors() -> bool:
    """Whether to show tracebacks of user errors: HYDRA_FULL_ERROR=1."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def tell(err: Exception, full: bool) -> int:
    """Report an error on stderr and return its exit code.

    Rank 0 reports a UserError or OSError in one line, after its traceback if `full` is set. A broken pipe is not
    reported, and a JobFailed was reported before. Any other error is a bug, and its traceback is printed.
    """
    if isinstance(err, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's exit would fail to flush stdout
        return ExitCode.PIPE_CLOSED
    if isinstance(err, UserError | OSError):
        if full:
            traceback.print_exception(err)
        if torchrun.rank_here():  # rank 0 reports it
            sleep(0 if isinstance(err, Told) else AFTER_YOU_S)
        else:
            print(f"specvlm: {message(err)}", file=sys.stderr)
        return ExitCode.MISTAKE
    if isinstance(err, JobFailed):
        return err.code
    traceback.print_exception(err)
    if not torchrun.rank_here():
        print("specvlm: this is a bug in specvlm or in a plugin, not a mistake on the command line", file=sys.stderr)
    return ExitCode.FAULT


def refuse(message: str) -> NoReturn:
    """Raise UserError. Replaces `ArgumentParser.error`, which would print the usage and exit."""
    raise UserError(f"{message}; --help lists what is accepted")


def print_lines(parser: ArgumentParser, words: Sequence[str] | None, made: Callable[[Namespace], Sequence[str]]) -> int:
    """Parse `words`, print the lines that `made` returns for the result, and return the exit code.

    words: Arguments of the command; None takes them from sys.argv.
    """
    parser.error = refuse  # type: ignore[method-assign]

    def action() -> int:
        args = parser.parse_args(words)
        loading()
        for line in made(args):
            print(visible(line))
        return ExitCode.OK

    return guarded(action)


def leave(action: Callable[[], int]) -> NoReturn:
    """Exit the process with the code that `action` returns. If it failed on one of several ranks, skips all cleanup."""
    try:
        code = action()
    except SystemExit as err:  # raised by rich if the reader of a pipe is gone
        code = err.code if isinstance(err.code, int) else int(err.code is not None)
    if code and torchrun.size_here() > 1:  # a pending collective would block a normal exit
        with suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
