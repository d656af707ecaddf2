"""Exceptions, exit codes and the text of error messages. Imports nothing else from specvlm.

The message of a `UserError` says in one line which value was given, what is allowed and what to do, if applicable.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import IntEnum

# Control characters except tab and newline, and characters that change the direction of the surrounding text.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST_WORD, LONGEST_LINE = 200, 590  # characters; a longer word or message is cut in the middle


class ExitCode(IntEnum):
    """Exit code of the process, and of each job of a sweep."""

    OK = 0  # no check found a wrong output
    MISMATCH = 1  # an output differs from the target's own, and rounding does not explain it
    MISTAKE = 2  # a UserError or OSError, explained in one line
    FAULT = 3  # a bug in specvlm or in a plugin, shown with its traceback
    LOST = 4  # another rank died
    FAILED = 5  # some samples failed or could not be checked
    INTERRUPTED = 130  # Ctrl-C
    PIPE_CLOSED = 141  # the reader of standard output is gone
    TERMINATED = 143  # SIGTERM


def worst(codes: Iterable[int]) -> int:
    """Combine exit codes: MISMATCH if it is among them, since only it means a wrong output, else the highest."""
    codes = [ExitCode.OK, *codes]
    return ExitCode.MISMATCH if ExitCode.MISMATCH in codes else max(codes)


class UserError(ValueError):
    """A mistake of the caller, explained in one line. A command that fails with it prints the line and exits with 2."""


class MissingVideo(UserError):
    """A video is missing. A job over a data set skips and counts such samples: local copies are often incomplete."""


class OutOfMemory(UserError):
    """Memory ran out during a run. Results written until then are kept."""


class Told(UserError):
    """A user error on a non-zero rank; rank 0 reports it."""


class JobFailed(Exception):
    """Ends a sweep with the exit code `code`, because one of its jobs failed, perhaps in another process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class StrategyError(Exception):
    """An error in a strategy; the message names the strategy if it is known.

    Replaces exceptions of a strategy that callers would misread: an OSError would look like a failure of the disk that
    holds the results, a SystemExit would end the process.
    """


def one_line(error: BaseException) -> str:
    """Format an error as one line. Unless it is a UserError or a StrategyError, the line begins with its type.

    The line then ends with the error's first note that starts with "in ", which names the strategy that raised it.
    """
    if isinstance(error, UserError | StrategyError):
        return message(error)
    try:
        notes = [note for note in getattr(error, "__notes__", []) if isinstance(note, str) and note.startswith("in ")]
    except BaseException:  # a plugin's exception may define __notes__ as a property that raises
        notes = []
    return f"{type(error).__name__}: {message(error)}" + (f" ({line(notes[0])})" if notes else "")


def message(error: BaseException) -> str:
    """Return an error's text as one line of limited length, or a placeholder if its `__str__` raises."""
    try:
        return line(str(error))
    except BaseException as broken:  # a plugin's exception may define a __str__ that raises
        return f"(its text raises {type(broken).__name__})"


def line(text: str) -> str:
    """Return text as one line that is safe to print. Long words and long lines are cut in the middle."""
    words = (_cut(word, LONGEST_WORD) for word in visible(text).split())
    return _cut(" ".join(words), LONGEST_LINE)


def visible(text: str) -> str:
    """Remove the characters in HIDDEN, which could move the cursor or reverse the text; surrogates become U+FFFD."""
    return SURROGATE.sub("\ufffd", HIDDEN.sub("", text))


def _cut(text: str, most: int) -> str:
    """Cut the middle out of a text with more than `most` characters."""
    half = most // 2 - 10
    return text if len(text) <= most else f"{text[:half]}…({len(text)} characters)…{text[-half:]}"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Context manager that turns an exception of a library into a UserError: `what` and the error's first line.

    For code that reads or uses a checkpoint's files. UserError, Ctrl-C, SystemExit, GeneratorExit and torch's
    OutOfMemoryError, for which the files are not to blame, pass unchanged.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        if type(error).__name__ == "OutOfMemoryError":  # not the files' fault; matched by name to avoid importing torch
            raise
        raise UserError(f"{what} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, cut to 300 characters, after the name of the error's type.

    The type is left out for an OSError, ImportError or ValueError (except UnicodeError) whose text has at least ten
    characters, and for a missing module, where the command that installs it follows the text.
    """
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{text}: pip install {error.name.partition('.')[0]}"
    told = isinstance(error, OSError | ValueError | ImportError) and not isinstance(error, UnicodeError) and len(text) > 9
    return text if told else f"{type(error).__name__}: {text}".removesuffix(": ")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``' Did you mean "two_stage"?'`` for the closest known name; ``''`` if none is close or `name` is long."""
    if len(name) > LONGEST_WORD:
        return ""
    near = get_close_matches(name, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def check_choice(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raise UserError if `value` is not in `allowed`. The message lists the allowed values and suggests a close one.

    what: Name of the value, to begin the message.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{what} must be {' or '.join(allowed)}, got {value!r}.{did_you_mean(str(value), allowed)}")


def check_range(what: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise UserError if `value` is outside low..high (inclusive) or NaN. what: its name, to begin the message."""
    if not low <= value <= high:
        bounds = f"at least {low}" if high == float("inf") else f"within {low} and {high}"
        raise UserError(f"{what} must be {bounds}, got {value}")
