"""Translate what lmms-eval passes to a model: its model_args, the generation_kwargs of a task, and chat messages.

Imports nothing of lmms-eval.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any

from specvlm import Options, UserError, load_pair
from specvlm.errors import did_you_mean

# Names of a pair's settings and of a call's options. Of these, `check` has a meaning of its own here.
KNOWN = [name for name in signature(load_pair).parameters if name not in ("target", "options")]
KNOWN += [option.name for option in fields(Options) if option.name != "n"]
ELSEWHERE = {
    **dict.fromkeys(("frames_upbound", "max_frames", "nframes", "num_frames"), "limit the frames with max_num_frames"),
    **dict.fromkeys(("device_map", "parallel"), "give one device of each model with device and draft_device"),
    **dict.fromkeys(("temperature", "top_p", "top_k", "do_sample"), "they are --gen_kwargs"),
    "n": "draw several answers with --repeats",
}
# Keys of generation_kwargs that change nothing at these values; any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "n", "best_of"), (1,)),
    "use_cache": (True, False),
    "image_aspect_ratio": ("original", "pad"),  # only for LLaVA's first checkpoints
}
IMPLIED = "\n\n"  # lmms-eval adds it to all tasks that set no `until`; its own classes ignore it, too


def pair_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of model_args, and parse values in JSON. Raises UserError for a name that does not exist."""
    for name in given:
        if name not in KNOWN:
            names = [*KNOWN, "pretrained", "max_num_frames"]
            known = f"; choose from {', '.join(names)}.{did_you_mean(name, names)}"
            hint = f": {ELSEWHERE[name]}" if name in ELSEWHERE else known
            raise UserError(f'model_args: there is no "{name}"{hint}')
    return {name: _parsed(name, value) for name, value in given.items()}


def _parsed(name: str, value: Any) -> Any:
    """Parse a text such as {"name": "two_stage", "mass": 0.2}. Returns anything else unchanged."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"model_args: {name}={value} is not valid JSON: {error}") from None


def call_options(kwargs: Mapping[str, Any], default: Options) -> dict[str, Any]:
    """Return the options of a call that the generation_kwargs of a task ask for.

    Raises:
        UserError: A key is unknown, or has a value that would change the answer in a way that specvlm does not know.
    """
    left = {name: value for name, value in kwargs.items() if value is not None}
    found: dict[str, Any] = {"verifier": _verifier(left, default)}
    until = [left.pop(name) for name in ("until", "stop_sequences") if name in left]
    texts = [text for given in until for text in ([given] if isinstance(given, str) else given)]
    found["stop"] = (*_stop(default), *(text for text in texts if text and text != IMPLIED))
    for name, ours in (("max_gen_toks", "max_new_tokens"), ("max_new_tokens",) * 2, ("repetition_penalty",) * 2, ("seed",) * 2):
        if name in left:
            found[ours] = left.pop(name)
    for name, value in left.items():
        if value not in NEUTRAL.get(name, ()):
            raise UserError(f"generation_kwargs: {name}={value!r} is not supported")
    return found


def _stop(default: Options) -> tuple[str, ...]:
    return (default.stop,) if isinstance(default.stop, str) else tuple(default.stop)


def _verifier(left: dict[str, Any], default: Options) -> Any:
    """Take the settings of sampling out of `left`, and return the verifier that applies them.

    Samples at a temperature above 0, unless do_sample is false, as Hugging Face does.
    """
    sample = left.pop("do_sample", None)
    temperature = left.pop("temperature", 1.0 if sample else 0.0)
    warps = {name: left.pop(name) for name in ("top_p", "top_k") if name in left}
    chosen = default.verifier if isinstance(default.verifier, Mapping) else {"name": default.verifier}
    samples = chosen["name"] in ("sampling", "coupled")
    if temperature == 0 or sample is False:
        return "greedy" if samples else default.verifier
    if not samples and chosen["name"] != "greedy":
        raise UserError(f"temperature={temperature}: verifier={chosen['name']} does not sample: use sampling or coupled")
    name = chosen["name"] if samples else "sampling"
    return {"name": name, "temperature": float(temperature), **warps}


def messages_of(chat: Sequence[Mapping[str, Any]], video: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Return a task's chat in the form of Hugging Face's templates. video: Reads a video of the chat.

    Raises UserError for sounds and for sections of videos.
    """
    return [{"role": turn["role"], "content": [_part(part, video) for part in turn["content"]]} for turn in chat]


def _part(part: Mapping[str, Any], video: Callable[[Any], Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "video"):
        raise UserError(f"a message has a part of type {kind}: specvlm takes text, image and video")
    if any(part.get(name) is not None for name in ("start_time", "end_time")):
        raise UserError("a message has a section of a video, by start_time or end_time: specvlm takes whole videos")
    return {"type": kind, kind: video(part["url"]) if kind == "video" else part["url"]}


def chosen_for_check(number: int, share: float) -> bool:
    """Whether request `number` is compared with the target alone. The chosen ones are evenly spaced."""
    return int((number + 1) * share) > int(number * share)
