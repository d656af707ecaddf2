"""Convert the fields of a body to options of a session's call."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from specvlm.errors import line
from specvlm.serve.chat_body import LONGEST_STOP, MOST_ANSWERS, ChatBody, OwnOptions, ProcessorRequest, VideoRequest
from specvlm.serve.errors import bad
from specvlm.session.options import MOST_SEED, Options

PLAIN = re.compile(r"[\w :\[\],+-]*")  # texts of strategies' fields: no dot and no slash
LONGEST_TEXT = 1000
FILES = frozenset(("costs",))  # fields of strategies that name files


def options_of(body: ChatBody, own: OwnOptions, default: Options) -> dict[str, Any]:
    """Convert a body to options of the session's call; leaves out those that the request does not set.

    Args:
        body: The body.
        own: The body's options under the key `specvlm`.
        default: Options of the session.

    Raises:
        ApiError: A value is wrong, or not supported.
    """
    limits = (body.max_completion_tokens, body.max_tokens)
    found = {
        "max_new_tokens": next((limit for limit in limits if limit is not None), None),
        "verifier": _verifier(body, default),
        "n": body.n if body.n and body.n > 1 else None,
        "stop": _stops(body.stop),
        "logprobs": _logprobs(body),
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": None if body.logit_bias is None else {_token(key): value for key, value in body.logit_bias.items()},
        "max_pixels": body.mm_processor_kwargs.max_pixels if body.mm_processor_kwargs else None,
        "speculate": own.speculate,
        "pruner": _strategy("pruner", own.pruner),
        "drafter": _strategy("drafter", own.drafter),
        "ratio": own.ratio,
        "positions": own.positions,
    }
    if body.min_tokens and not body.ignore_eos:
        raise bad("min_tokens is not supported without ignore_eos: leave it out", "min_tokens", "unsupported_parameter")
    chosen = {name: value for name, value in found.items() if value is not None}
    return chosen | {"seed": _seed(body)} if _is_random(chosen.get("verifier", default.verifier)) else chosen


def _verifier(body: ChatBody, default: Options) -> Any:
    """Choose the verifier: `greedy` at temperatures below 0.001, else `coupled`, or `sampling` if the server's own is.

    Returns None to use the server's own.
    """
    own = default.verifier
    name, values = _named(own)
    if body.temperature is None and (name not in ("coupled", "sampling") or (body.top_p is None and body.top_k is None)):
        return None  # greedy decoding does not depend on top_p and top_k
    if body.temperature == 0:
        return "greedy"
    asked = {"temperature": body.temperature, "top_p": body.top_p, "top_k": None if body.top_k is None else max(body.top_k, 0)}
    if body.temperature is not None and body.temperature < 0.001:
        return "greedy"  # too small for a verifier
    is_random = name in ("coupled", "sampling")
    return (
        {"name": name if is_random else "coupled"}
        | (values if is_random else {})
        | {key: value for key, value in asked.items() if value is not None}
    )


def _named(strategy: Any) -> tuple[str, dict[str, Any]]:
    """Name and sampling fields of a verifier, given as a name, a mapping or an instance."""
    if isinstance(strategy, str):
        return strategy, {}
    keys = ("name", "temperature", "top_p", "top_k")
    is_mapping = isinstance(strategy, Mapping)
    values = {key: strategy.get(key) if is_mapping else getattr(strategy, key, None) for key in keys}
    return str(values.pop("name")), {key: value for key, value in values.items() if value is not None}


def _is_random(verifier: Any) -> bool:
    return _named(verifier)[0] != "greedy"


def _seed(body: ChatBody) -> int:
    """The request's seed, within the session's bounds; a random one if it has none."""
    return secrets.randbelow(2**53) if body.seed is None else body.seed % (MOST_SEED - 2 * MOST_ANSWERS)


def _stops(given: str | Sequence[str] | None) -> list[str] | None:
    stops = [given] if isinstance(given, str) else list(given or [])
    if any(not stop or len(stop) > LONGEST_STOP for stop in stops):
        raise bad(f"stop: a stop text has 1 to {LONGEST_STOP} characters", "stop")
    return stops or None


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs=true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _token(key: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", key):
        raise bad(f"logit_bias has the key {line(key)[:40]!r}: expected token ids", "logit_bias")
    return int(key)


def _strategy(kind: str, given: str | dict[str, Any] | None) -> Any:
    """Check a strategy of a request: plain values, and no text that could name a file."""
    if isinstance(given, dict) and (names := FILES & given.keys()):
        name = min(names)
        raise bad(f"specvlm.{kind}: {name} names a file of the server: leave it out", f"specvlm.{kind}")
    values = list(given.values()) if isinstance(given, dict) else [given]
    for value in values:
        if isinstance(value, str) and (len(value) > LONGEST_TEXT or not PLAIN.fullmatch(value)):
            raise bad(f"specvlm.{kind}: {line(value)[:60]!r} is neither a name nor a shape", f"specvlm.{kind}")
        if not isinstance(value, str | int | float | bool | None) or (isinstance(value, float) and not math.isfinite(value)):
            raise bad(f"specvlm.{kind}: the fields of a strategy are numbers, strings and booleans", f"specvlm.{kind}")
    return given


def sampling_of(body: ChatBody) -> dict[str, Any]:
    """Return `frames` or `fps` from vLLM's `media_io_kwargs` and `mm_processor_kwargs`; empty if neither is set."""
    video = (body.media_io_kwargs and body.media_io_kwargs.video) or VideoRequest()
    processor = body.mm_processor_kwargs or ProcessorRequest()
    frames = video.num_frames if video.num_frames is not None and video.num_frames > 0 else None
    fps = next((value for value in (video.fps, processor.fps) if value is not None and value > 0), None)
    if video.num_frames == 0:
        raise bad("num_frames: expected a number from 1, or -1 for the model's own rule", "media_io_kwargs.video.num_frames")
    if frames is not None and fps is not None:
        raise bad("num_frames and fps cannot both be set: leave one out", "media_io_kwargs.video")
    if processor.do_sample_frames is False and frames is None and fps is None:
        raise bad("do_sample_frames=false needs num_frames or fps in media_io_kwargs.video", "mm_processor_kwargs")
    return {key: value for key, value in (("frames", frames), ("fps", fps)) if value is not None}
