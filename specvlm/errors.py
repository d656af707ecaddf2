"""The caller's mistakes: what was seen, what is allowed, what to do, on one line. And how a process ends. Knows nothing else of
specvlm.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import IntEnum

# Control characters but tab and newline, and those that change the direction of the text around them.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST_WORD, LONGEST_LINE = 200, 590  # characters of a message


class ExitCode(IntEnum):
    """Of a process, and of each job."""

    OK = 0  # the output is the target's own
    MISMATCH = 1
    MISTAKE = 2  # the caller's; one line says which
    FAULT = 3  # of specvlm or a plugin; with its traceback
    LOST = 4  # another rank died
    FAILED = 5  # samples failed; all others are done
    INTERRUPTED = 130
    PIPE_CLOSED = 141
    TERMINATED = 143


def worst(codes: Iterable[int]) -> int:
    """The exit code of several jobs: MISMATCH if any, since it alone says that an output is wrong, else the highest."""
    codes = [ExitCode.OK, *codes]
    return ExitCode.MISMATCH if ExitCode.MISMATCH in codes else max(codes)


class UserError(ValueError):
    """A mistake of the caller's that one line explains; the command line prints it and exits with code 2."""


class MissingVideo(UserError):
    """The video is not there; in a data set its sample is skipped and counted, since no copy is complete."""


class OutOfMemory(UserError):
    """Found out only by trying; what was done until then is kept."""


class Told(UserError):
    """On another rank than the first, which has heard of it and says it."""


class JobFailed(Exception):
    """Ends a sweep with an exit code, where a job ends it or runs in another process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class StrategyError(Exception):
    """What a strategy did wrong, named; also in place of what it raised, where that would pass for something else: an OSError
    (it is not the disk that results are written to), an exit of the process.
    """


def one_line(error: BaseException) -> str:
    """What an error says, with its type in front unless it is one whose text is for the user."""
    if isinstance(error, UserError | StrategyError):
        return message(error)
    try:
        notes = [note for note in getattr(error, "__notes__", []) if isinstance(note, str) and note.startswith("in ")]
    except BaseException:  # it may be a property of a plugin's
        notes = []
    return f"{type(error).__name__}: {message(error)}" + (f" ({line(notes[0])})" if notes else "")


def message(error: BaseException) -> str:
    """What an error says, on one line of bearable length. A text that cannot be made is none."""
    try:
        return line(str(error))
    except BaseException as broken:  # an exception of a plugin may have a __str__ of its own
        return f"(its text raises {type(broken).__name__})"


def line(text: str) -> str:
    """Text on one line, as a terminal may have it; long words and long lines are cut in the middle."""
    words = (_cut(word, LONGEST_WORD) for word in visible(text).split())
    return _cut(" ".join(words), LONGEST_LINE)


def visible(text: str) -> str:
    """Text as a terminal may have it: nothing in it moves the cursor, rings the bell or turns the text around it."""
    return SURROGATE.sub("\ufffd", HIDDEN.sub("", text))


def _cut(text: str, most: int) -> str:
    half = most // 2 - 10
    return text if len(text) <= most else f"{text[:half]}…({len(text)} characters)…{text[-half:]}"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever a library raises over a checkpoint's files becomes a UserError: `what`, and the first line of what was said."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the tokenizers library panics, which is no Exception
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this file does not import: not the files' fault
            raise
        raise UserError(f"{what} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What it says; its type too where the text alone would be a riddle."""
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{text}: pip install {error.name.partition('.')[0]}"
    told = isinstance(error, OSError | ValueError | ImportError) and not isinstance(error, UnicodeError) and len(text) > 9
    return text if told else f"{type(error).__name__}: {text}".removesuffix(": ")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``' Did you mean "two_stage"?'`` for the nearest known name, or ``''`` where none is near."""
    if len(name) > LONGEST_WORD:
        return ""
    near = get_close_matches(name, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def check_choice(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raise UserError, with what is allowed and what may have been meant, where `value` is none of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{what} must be {' or '.join(allowed)}, got {value!r}.{did_you_mean(str(value), allowed)}")


def check_range(what: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise UserError where `value` is not within low..high, both allowed."""
    if not low <= value <= high:
        bounds = f"at least {low}" if high == float("inf") else f"within {low} and {high}"
        raise UserError(f"{what} must be {bounds}, got {value}")
