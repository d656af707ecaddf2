"""Guard the methods of plugins' model families, so that an error or a wrong result names the family and the method.

Built-in families are not guarded: an error in one is a bug of specvlm, which ends a command with its traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Signature, signature
from numbers import Integral
from types import FunctionType
from typing import Any
from weakref import WeakSet

from torch import Tensor

from specvlm.errors import UserError, did_you_mean, one_line
from specvlm.models.plugins import PluginError, traced
from specvlm.types import Features, TokenGrid, VideoPrompt, entering
from specvlm.video.video import read_video

# Error texts of torch's allocator and CUDA's libraries when memory runs out, which is not the family's fault.
MEMORY = ("can't allocate memory", "ALLOC_FAILED", "out of memory")
GUARDED = WeakSet[type]()
Check = Callable[[Any, Mapping[str, Any]], str]


def guard(family: type) -> None:
    """Guard what a family's class and its bases define, except for specvlm's own classes. Does it once."""
    for cls in family.__mro__:
        if cls in GUARDED or is_builtin(cls):
            continue
        GUARDED.add(cls)
        for name in METHODS & vars(cls).keys():
            found = vars(cls)[name]
            if isinstance(found, staticmethod):
                setattr(cls, name, staticmethod(_guarded(cls, name, found.__func__)))
            elif isinstance(found, property) and found.fget is not None:
                setattr(cls, name, property(_guarded(cls, name, found.fget)))
            elif isinstance(found, FunctionType):
                setattr(cls, name, _guarded(cls, name, found))


def is_builtin(family: type) -> bool:
    """Whether a class is one of specvlm's own, or Python's."""
    return family.__module__.partition(".")[0] in ("specvlm", "builtins", "abc")


def _guarded(cls: type, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method: name the family in its errors, and check what it returns."""
    check, takes = CHECKS.get(name), signature(method)

    @wraps(method)
    def guarded(*given: Any, **named: Any) -> Any:
        asked = _arguments(takes, given, named)
        recorded = _recorded(asked)
        try:
            result = method(*given, **named)
        except Exception as error:
            if _passes(error):
                raise
            raise traced(f"{_label(cls, name)} raised {one_line(error)}{_place(cls, error)}", error) from error
        if check is not None and (wrong := check(result, {**asked, "recorded": recorded})):
            raise PluginError(f"{_label(cls, name)} {wrong}")
        return result

    return guarded


def _passes(error: Exception) -> bool:
    """Whether an error passes through unchanged: a user error, or out of memory."""
    if isinstance(error, UserError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY)


def _label(cls: type, name: str) -> str:
    """Return the name of a method as messages show it."""
    return f"model family {getattr(cls, 'family', '?')}: {cls.__module__}.{cls.__qualname__}.{name}"


def _place(cls: type, error: Exception) -> str:
    """Return where in the class's own file an error arose, such as ", in line 12"; empty if it arose elsewhere."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", in line {lines[-1]}" if lines else ""


def _arguments(takes: Signature, given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name. Empty if they do not fit the method; the call itself then raises."""
    try:
        return dict(takes.bind(*given, **named).arguments)
    except TypeError:
        return {}


def _recorded(asked: Mapping[str, Any]) -> int:
    """Return the number of tokens recorded in `sight` so far."""
    return sum(map(len, getattr(asked.get("sight"), "parts", ())))


# ---- checks of results: each returns what is wrong, as the end of a sentence, or an empty string


def _processed_video(result: Any, asked: Mapping[str, Any]) -> str:
    fits = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], TokenGrid) and isinstance(result[1], dict)
    return "" if fits else f"must return a TokenGrid and a dict of tensors, got {_told(result)}"


def _processed_image(result: Any, asked: Mapping[str, Any]) -> str:
    fits = isinstance(result, dict) and "tokens" in result
    return "" if fits else f'must return a dict with the number of the image\'s tokens under "tokens", got {_told(result)}'


def _video_features(result: Any, asked: Mapping[str, Any]) -> str:
    tokens = len(asked["grid"]) if "grid" in asked else None
    if wrong := _features(result, tokens, "the grid"):
        return wrong
    if asked.get("sight") is None or (added := _recorded(asked) - asked["recorded"]) == tokens:
        return ""
    return f"is given `sight` and adds {added} of {tokens} tokens to it: call sight.add with a row for each"


def _image_features(result: Any, asked: Mapping[str, Any]) -> str:
    """Check an image's features. Their number is unknown if the family itself calls the method, for tiles."""
    return _features(result, asked.get("image", {}).get("tokens"), 'the image ("tokens")')


def _features(result: Any, tokens: int | None, of: str) -> str:
    """Check the number of rows, if it is known."""
    if not isinstance(result, Tensor | Features):
        return f"must return a tensor or Features, got {_told(result)}"
    rows = len(entering(result))
    return "" if tokens in (None, rows) else f"returns {rows} rows of features, and {of} has {tokens} tokens"


def _runs(result: Any, asked: Mapping[str, Any]) -> str:
    if "grid" not in asked or _adds_up(result, len(asked["grid"])):
        return ""
    return f"must return whole numbers that add up to the tokens of the grid, {asked['grid']}, got {_told(result)}"


def _image_runs(result: Any, asked: Mapping[str, Any]) -> str:
    tokens = asked.get("image", {}).get("tokens")
    if tokens is None or _adds_up(result, tokens):
        return ""
    return f'must return whole numbers that add up to the {tokens} tokens of the image ("tokens"), got {_told(result)}'


def _adds_up(result: Any, total: int) -> bool:
    return isinstance(result, list | tuple) and all(isinstance(run, Integral) for run in result) and sum(result) == total


def _template(result: Any, asked: Mapping[str, Any]) -> str:
    return "" if result is None or isinstance(result, str) else f"must return a chat template or None, got {_told(result)}"


def _sampling(result: Any, asked: Mapping[str, Any]) -> str:
    takes = signature(read_video).parameters.keys() - {"source", "reader", "start", "end"}
    if not isinstance(result, dict):
        return f"must return a dict of arguments of read_video, got {_told(result)}"
    if wrong := sorted(map(str, result.keys() - takes)):
        return f"returns {wrong[0]!r}; it may have {', '.join(sorted(takes))}.{did_you_mean(wrong[0], takes)}"
    return ""


def _hf_inputs(result: Any, asked: Mapping[str, Any]) -> str:
    fits = isinstance(result, dict) and all(isinstance(value, Tensor) for value in result.values())
    return "" if fits else f"must return a dict of tensors, got {_told(result)}"


def _hf_prompt(result: Any, asked: Mapping[str, Any]) -> str:
    return "" if isinstance(result, VideoPrompt) else f"must return a VideoPrompt, got {_told(result)}"


def _told(value: Any) -> str:
    """Describe a value by its type, and a container by what is in it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_told(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_told, value))})"
    return repr(value) if isinstance(value, int | float | str | list) else type(value).__name__


CHECKS: dict[str, Check] = {
    "process_video": _processed_video,
    "process_image": _processed_image,
    "encode_video": _video_features,
    "encode_image": _image_features,
    "runs": _runs,
    "image_runs": _image_runs,
    "template": _template,
    "sampling": _sampling,
    "hf_inputs": _hf_inputs,
    "hf_prompt": _hf_prompt,
}
METHODS = frozenset((*CHECKS, "slots", "marks", "levels", "vision_values", "check_settings", "frame_patches", "positions"))
METHODS |= {"spell_video", "spell_image"}
