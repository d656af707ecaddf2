"""Parse the body of a chat completion and convert it to messages and options of the session."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import ValidationError

from specvlm.errors import line
from specvlm.serve.chat_body import HARMLESS, MOST_NAMES, UNSUPPORTED, ChatBody, Message, OwnOptions, Part
from specvlm.serve.chat_options import options_of, sampling_of
from specvlm.serve.errors import ApiError, bad
from specvlm.session.options import Options


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: Name of the model.
        messages: Roles, and contents with addresses in place of videos and images.
        options: Options of the session's call, except those that sample frames.
        sampling: `frames` or `fps`, if the request sets one.
        stream: Whether the answer is a stream.
        usage: Whether a stream ends with token counts and statistics.
        explain: Whether the answer describes its rounds and frames.
        stop_ids: More token ids that end the answer.
        ignore_eos: Whether the checkpoint's stop ids do not end it.
        ignored: Names of unknown fields.
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
    """Parse and check the body of a chat completion.

    Args:
        raw: The body.
        default: Options of the session.

    Raises:
        ApiError: The body is not JSON, a field has a wrong value, or something is not supported.
    """
    given = _json(raw)
    if len(given) > MOST_NAMES:
        raise bad(f"the body has {len(given):,} names: at most {MOST_NAMES} are allowed")
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
    messages, options = [_message(message, at) for at, message in enumerate(body.messages)], options_of(body, own, default)
    told = (bool(body.stream), usage, bool(own.explain), ignored[:20])
    ends = (tuple(body.stop_token_ids or ()), bool(body.ignore_eos))
    return ChatRequest(body.model, messages, options, sampling_of(body), *told, *ends)


def _json(raw: bytes) -> Any:
    """Parse JSON. Raises ApiError for anything else, including NaN and infinities."""

    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a number in JSON")

    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=no_number)
    except RecursionError:
        raise bad("the body is nested too deeply") from None
    except ValueError as error:
        raise bad(f"the body is not JSON in UTF-8: {line(str(error))[:200]}") from None
    if not isinstance(found, dict):
        raise bad("the body must be a JSON object")
    return found


def _refused(error: ValidationError) -> ApiError:
    """Convert pydantic's first error, or in messages the most deeply nested one, to an error for the client."""
    found = error.errors(include_url=False, include_context=False)
    first = max(found, key=lambda one: len(one["loc"])) if found[0]["loc"][:1] == ("messages",) else found[0]
    place = ".".join(str(step) for step in first["loc"] if not re.search(r"[\[(]|^(str|Message|Part|Address)$", str(step)))
    if first["type"] == "missing":
        return bad(f"{place} is missing", place)
    value = first["input"][:100] if isinstance(first["input"], str) else first["input"]
    shown = "" if isinstance(value, dict | list) else f", got {line(repr(value))[:80]}"
    return bad(f"{place}: {first['msg'].replace('Input should be', 'expected')}{shown}", place)


def _check_unsupported(extra: Mapping[str, Any]) -> None:
    for name, nothing in UNSUPPORTED.items():
        if name in extra and not any(type(extra[name]) is type(value) and extra[name] == value for value in nothing):
            raise bad(f"{name} is not supported: leave it out", name, "unsupported_parameter")


def _message(message: Message, at: int) -> dict[str, Any]:
    """Check a message and keep its role and content. As OpenAI says, a developer's message is a system message."""
    where = f"messages.{at}"
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        raise bad("tools are not supported", where, "unsupported_parameter")
    role = {"developer": "system"}.get(message.role, message.role)
    if role not in ("system", "user", "assistant"):
        raise bad(f"role={line(message.role)[:40]}: expected system, user or assistant", f"{where}.role")
    if message.content is None:
        raise bad("a message needs content", f"{where}.content")
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
