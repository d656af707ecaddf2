"""The caller's mistakes: what was seen, what is allowed, what to do, on one line. Knows nothing else of specvlm."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake of the caller's that one line explains; the command line prints it and exits with code 2."""


class OutOfMemory(UserError):
    """Found out only by trying; what was done until then is kept."""


class Told(UserError):
    """On another rank than the first, which has heard of it and says it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``' Did you mean "two_stage"?'`` for the nearest known name, or ``''`` where none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""
