"""Quote free texts and paths on the command line, before Hydra reads it."""

import os
import re
from collections.abc import Sequence

from specvlm.errors import UserError
from specvlm.parsing.files import escaped

TEXT_KEYS = ("question",)
# Values that the user has quoted, or that mean something to Hydra; they stay as they are.
HYDRAS_OWN = re.compile(r"""(['"]).*\1|null|\?\?\?|(choice|glob|shuffle)\(.*\)""", re.DOTALL)
UNQUOTED = re.compile(r"[\w/.%@?|*:+-]+", re.ASCII)  # texts that Hydra reads without quotes
LIST_KEYS = ("video", "image")  # may be lists of paths
PATH_KEYS = (*LIST_KEYS, "target.path", "draft.path", "baselines", "dataset.root", "dataset.questions")
LISTED = re.compile(r"\[([^\[\]]*)\]")
LISTS = re.compile(rf"{LISTED.pattern}(,{LISTED.pattern})*")  # one list, or those of a sweep
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")  # output folder of a run, and of a sweep
AT_HOME = (*FOLDERS, "baselines", "dataset.root")  # ~ is expanded here: shells do not after "=", Hydra cannot read it


def quoted(words: Sequence[str], sweep: bool) -> list[str]:
    """Quote free texts and paths for Hydra, whose grammar gives commas, brackets and apostrophes a meaning.

    In a sweep a comma in `video=a.mp4,b.mp4` separates values, unless a file with the whole name exists. Expands ~ in
    output folders, `baselines` and `dataset.root`.

    Raises:
        UserError: The name of an output folder is empty.
    """
    return [_quoted(word, sweep) for word in words]


def _quoted(word: str, sweep: bool) -> str:
    """Quote one override; see `quoted`."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if name in AT_HOME and value.startswith("~"):
        value = os.path.expanduser(value)
        word = f"{key}={value}"
    if name in FOLDERS and equals and not value:
        raise UserError(f"{word} names no folder: is a variable of your shell empty?")
    if not equals or not value:
        return word
    if name in TEXT_KEYS:  # never interpolated, however it is quoted
        return f"{key}={value.replace('${', chr(92) + '${') if HYDRAS_OWN.fullmatch(value) else quoted_text(value)}"
    if HYDRAS_OWN.fullmatch(value):
        return word
    if name in FOLDERS or (name == "drafter.shape" and value.startswith("[")):  # a tree shape is a text that looks like a list
        return f"{key}={quoted_text(value, filled=True)}"
    if name not in PATH_KEYS:
        return word
    there = os.path.exists(os.path.expanduser(value))
    if name in LIST_KEYS and not there and LISTS.fullmatch(value):
        return f"{key}={LISTED.sub(_list, value)}"
    if there or not sweep:
        return f"{key}={quoted_text(value, filled=not there)}"
    parts = value.split(",")  # values of a sweep
    own = ("${" in part or not part or UNQUOTED.fullmatch(part) or HYDRAS_OWN.fullmatch(part) for part in parts)
    return f"{key}={','.join(part if is_own else quoted_text(part) for part, is_own in zip(parts, own, strict=True))}"


def _list(found: re.Match[str]) -> str:
    """Quote the paths of a list."""
    paths = (path.strip() for path in found[1].split(","))
    return f"[{','.join(path if HYDRAS_OWN.fullmatch(path) else quoted_text(path, filled=True) for path in paths if path)}]"


def quoted_text(value: str, filled: bool = False) -> str:
    """Quote a text for Hydra. filled: let OmegaConf resolve `${…}` in the text; else it is read literally."""
    value = value if filled else escaped(value)
    inner = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{inner}'"
