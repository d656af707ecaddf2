"""The body of a chat completion: parse it, and turn it into messages and options of the session."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specvlm.errors import line
from specvlm.serve.errors import ApiError, bad
from specvlm.session.options import MOST_SEED, Options

MOST_MESSAGES, MOST_PARTS, MOST_TEXT, MOST_ANSWERS = 256, 512, 1_000_000, 8
MOST_STOPS, LONGEST_STOP = 16, 1000
# Fields that OpenAI's clients send and that change nothing here.
HARMLESS = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("verbosity", "parallel_tool_calls", "request_id", "priority"),
    )
)
# Fields of OpenAI or vLLM that would change the answer, and the values that ask for nothing.
NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, "")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "function_call", "audio", "prediction", "web_search_options"), NOTHING),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), NOTHING),
    **dict.fromkeys(("min_p", "use_beam_search", "prompt_logprobs", "echo", "bad_words", "allowed_token_ids"), NOTHING),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "documents", "logits_processors", "vllm_xargs"), NOTHING),
    **dict.fromkeys(("truncate_prompt_tokens", "include_stop_str_in_output", "return_token_ids"), NOTHING),
    **dict.fromkeys(("add_special_tokens", "continue_final_message"), NOTHING),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "best_of": (None, 1),
    "length_penalty": (None, 1),
    "reasoning_effort": (None, "none"),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "add_generation_prompt": (None, True),
}
PLAIN = re.compile(r"[\w :\[\],+-]*")  # texts of strategies' fields: no dot and no slash, so none names a file

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=MOST_TEXT)]


class Body(BaseModel):
    """A part of the body. Types are strict: "3" and true are no numbers."""

    model_config = ConfigDict(strict=True, extra="allow")


class Address(Body):
    """Where a video or an image is."""

    url: str


class Part(Body):
    """A part of a message."""

    type: str
    text: Text | None = None
    video_url: Address | None = None
    image_url: Address | str | None = None


class Message(Body):
    """A message."""

    role: str
    content: Text | Annotated[list[Part], Field(max_length=MOST_PARTS)] | None = None
    tool_calls: Any = None
    function_call: Any = None


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None


class VideoRequest(Body):
    """How videos are sampled, as vLLM's `media_io_kwargs.video` says it."""

    num_frames: Annotated[int, Field(ge=-1, le=16_384)] | None = None
    fps: Annotated[Finite, Field(le=1000)] | None = None


class MediaRequest(Body):
    """vLLM's `media_io_kwargs`."""

    video: VideoRequest | None = None


class ProcessorRequest(Body):
    """vLLM's `mm_processor_kwargs`."""

    fps: Annotated[Finite, Field(gt=0, le=1000)] | None = None
    do_sample_frames: bool | None = None
    max_pixels: Annotated[int, Field(ge=1, le=2**26)] | None = None


class OwnOptions(BaseModel):
    """Our options, under the key `specvlm`. Others are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")

    speculate: bool | None = None
    pruner: str | dict[str, Any] | None = None
    drafter: str | dict[str, Any] | None = None
    ratio: Annotated[Finite, Field(ge=0, le=1)] | None = None
    positions: Literal["original", "reindexed"] | None = None
    explain: bool | None = None


class ChatBody(Body):
    """The body of a chat completion."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**24)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    media_io_kwargs: MediaRequest | None = None
    mm_processor_kwargs: ProcessorRequest | None = None
    specvlm: OwnOptions | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: Name of the model.
        messages: Roles, and contents with addresses in the place of videos and images.
        options: Options of the session's call, but those that sample frames.
        sampling: `frames` or `fps`, if the request sets one.
        stream: Whether the answer is a stream.
        usage: Whether a stream ends with numbers of tokens and statistics.
        explain: Whether rounds and frames are told.
        stop_ids: Token ids that end the answer, too.
        ignore_eos: Whether the checkpoint's do not.
        ignored: Names of fields that nobody knows.
    """

    model: str
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    usage: bool = False
    explain: bool = False
    ignored: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def answers(self) -> int:
        """Number of answers."""
        return int(self.options.get("n") or 1)


def chat_request(raw: bytes, default: Options) -> ChatRequest:
    """Parse a body.

    Args:
        raw: The body.
        default: Options of the session.

    Raises:
        ApiError: It is no JSON, a field has a wrong value, or asks for what is not supported.
    """
    given = _json(raw)
    try:
        body = ChatBody.model_validate(given)
    except ValidationError as error:
        raise _refused(error) from None
    extra = body.model_extra or {}
    _check_unsupported(extra)
    ignored = tuple(sorted(line(name)[:60] for name in extra if name not in UNSUPPORTED and name not in HARMLESS))
    own = body.specvlm or OwnOptions()
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options is for streams: set stream, or leave it out", "stream_options")
    usage = bool(body.stream_options and body.stream_options.include_usage)
    messages, options = [_message(message, at) for at, message in enumerate(body.messages)], _options(body, own, default)
    told = (bool(body.stream), usage, bool(own.explain), ignored[:20])
    ends = (tuple(body.stop_token_ids or ()), bool(body.ignore_eos))
    return ChatRequest(body.model, messages, options, _sampling(body), *told, *ends)


def _json(raw: bytes) -> Any:
    """Parse JSON. Raises ApiError for anything else; NaN and infinities are no JSON."""

    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=no_number)
    except RecursionError:
        raise bad("the body is nested too deeply") from None
    except ValueError as error:
        raise bad(f"the body is no JSON in UTF-8: {line(str(error))[:200]}") from None
    if not isinstance(found, dict):
        raise bad("the body must be a JSON object")
    return found


def _refused(error: ValidationError) -> ApiError:
    """Put the first finding of pydantic into words."""
    found = error.errors(include_url=False)
    first = max(found, key=lambda one: len(one["loc"])) if found[0]["loc"][:1] == ("messages",) else found[0]
    place = ".".join(str(step) for step in first["loc"] if not re.search(r"[\[(]|^(str|Message|Part|Address)$", str(step)))
    if first["type"] == "missing":
        return bad(f"{place} is missing", place)
    shown = "" if isinstance(first["input"], dict | list) else f", got {line(repr(first['input']))[:80]}"
    return bad(f"{place}: {first['msg'].replace('Input should be', 'expected')}{shown}", place)


def _check_unsupported(extra: Mapping[str, Any]) -> None:
    for name, nothing in UNSUPPORTED.items():
        if name in extra and not any(type(extra[name]) is type(value) and extra[name] == value for value in nothing):
            raise bad(f"{name} is not supported: leave it out", name, "unsupported_parameter")


def _message(message: Message, at: int) -> dict[str, Any]:
    """Check a message. Only role and content remain; a developer's message is a system message, as OpenAI says."""
    where = f"messages.{at}"
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        raise bad("tools are not supported", where, "unsupported_parameter")
    role = {"developer": "system"}.get(message.role, message.role)
    if role not in ("system", "user", "assistant"):
        raise bad(f"role={line(message.role)[:40]}: expected system, user or assistant", f"{where}.role")
    if message.content is None:
        raise bad("a message needs a content", f"{where}.content")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    return {"role": role, "content": [_part(part, f"{where}.content.{number}") for number, part in enumerate(message.content)]}


def _part(part: Part, where: str) -> dict[str, Any]:
    """Check a part of a message: a text, or the address of a video or an image."""
    if part.type == "text" and part.text is not None:
        return {"type": "text", "text": part.text}
    if part.type == "image_url" and part.image_url is not None:
        return {"type": "image", "image": part.image_url if isinstance(part.image_url, str) else part.image_url.url}
    if part.type == "video_url" and part.video_url is not None:
        return {"type": "video", "video": part.video_url.url}
    if part.type in ("text", "image_url", "video_url"):
        raise bad(f"a part of type {part.type} needs {part.type}", f"{where}.{part.type}")
    raise bad(f"a part of type {line(part.type)[:40]}: expected text, image_url or video_url", f"{where}.type")


def _options(body: ChatBody, own: OwnOptions, default: Options) -> dict[str, Any]:
    """Make the options of the session's call."""
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
    """Choose the verifier: greedy at temperature 0, else `coupled`, or `sampling` if the server's own is that.

    None leaves the server's own.
    """
    own = default.verifier
    name, values = _named(own)
    if body.temperature is None and (name not in ("coupled", "sampling") or (body.top_p is None and body.top_k is None)):
        return None  # greedy decoding does not depend on top_p and top_k
    if body.temperature == 0:
        return "greedy"
    asked = {"temperature": body.temperature, "top_p": body.top_p, "top_k": None if body.top_k is None else max(body.top_k, 0)}
    if body.temperature is not None and body.temperature < 0.001:
        return "greedy"  # below what a verifier takes
    kept = values if name in ("coupled", "sampling") else {}
    return {"name": name if kept else "coupled"} | kept | {key: value for key, value in asked.items() if value is not None}


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
    """The request's seed, within the session's bounds; without one, any."""
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
    values = list(given.values()) if isinstance(given, dict) else [given]
    for value in values:
        if isinstance(value, str) and not PLAIN.fullmatch(value[:1000]):
            raise bad(f"specvlm.{kind}: {line(value)[:60]!r} is neither a name nor a shape", f"specvlm.{kind}")
        if not isinstance(value, str | int | float | bool | None) or (isinstance(value, float) and not math.isfinite(value)):
            raise bad(f"specvlm.{kind}: the fields of a strategy are numbers, texts and truth values", f"specvlm.{kind}")
    return given


def _sampling(body: ChatBody) -> dict[str, Any]:
    """Frames or frames per second, from vLLM's two places."""
    video = (body.media_io_kwargs and body.media_io_kwargs.video) or VideoRequest()
    processor = body.mm_processor_kwargs or ProcessorRequest()
    frames = video.num_frames if video.num_frames is not None and video.num_frames > 0 else None
    fps = next((value for value in (video.fps, processor.fps) if value is not None and value > 0), None)
    if video.num_frames == 0:
        raise bad("num_frames: expected a number from 1, or -1 for the model's own rule", "media_io_kwargs.video.num_frames")
    if frames is not None and fps is not None:
        raise bad("num_frames and fps exclude each other: set one", "media_io_kwargs.video")
    if processor.do_sample_frames is False and frames is None and fps is None:
        raise bad("do_sample_frames=false needs num_frames or fps in media_io_kwargs.video", "mm_processor_kwargs")
    return {key: value for key, value in (("frames", frames), ("fps", fps)) if value is not None}
