"""Turn a question or a chat into prompt tokens with the checkpoint's tokenizer and chat template.

Does what Hugging Face's processors do, without torchvision, which they need.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specvlm.errors import SURROGATE, UserError, explained, line
from specvlm.models.placeholders import Spelling
from specvlm.process.child import ChildError, in_child
from specvlm.process.memo import KeptTexts
from specvlm.video.settings import read_json

Part = Mapping[str, Any]
Message = Mapping[str, Any]  # role, and content: a text or parts
PLAIN = "x"  # a question that no tokenizer can read as anything but text
UNSTEADY = ("strftime_now", "random", "lipsum")  # with these a template may render the same chat differently

_KEPT = KeptTexts(most=256, longest=2**14)


def tokenizer_of(folder: Path) -> Any:
    """Load the checkpoint's tokenizer, with the processor's chat template if there is one, else its own.

    Raises UserError if either cannot be used.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_json(folder / name)
    with explained(f"{folder}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        own = tokenizer.chat_template
    found = processor_template(folder) or own
    if isinstance(found, dict) and "default" not in found:
        raise UserError(f"{folder}: has chat templates named {', '.join(map(str, found))}, and none named default")
    found = found["default"] if isinstance(found, dict) else found
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{folder}: the tokenizer has no chat template, and there is none beside it")
    tokenizer.chat_template = found
    return tokenizer


def processor_template(folder: Path) -> Any:
    """Return the chat template that Hugging Face's processor would use: a text, a dict of named ones, or None.

    Uses Hugging Face's own function, which looks into processor_config.json, chat_template.json, chat_template.jinja
    and additional_chat_templates. Raises UserError if one of these files cannot be used.
    """
    from transformers.processing_utils import ProcessorMixin

    settings, legacy = read_json(folder / "processor_config.json"), folder / "chat_template.json"
    if "audio_tokenizer" in settings or (folder / "audio_tokenizer_config.json").is_file():
        raise UserError(f"{folder}: names an audio tokenizer, which is not supported")
    if legacy.is_file() and "chat_template" not in read_json(legacy):
        raise UserError(f"{legacy}: has no chat_template in it")
    with explained(f"{folder}: the chat template cannot be read"):
        found, _ = ProcessorMixin.get_processor_dict(folder, local_files_only=True)
        return found.get("chat_template")


def prompt_ids(tokenizer: Any, content: Sequence[Part], question: str, template: str | None = None) -> list[int]:
    """Return the token ids of a user turn, `content` followed by the question. Raises UserError as `chat_ids`."""
    turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    return chat_ids(tokenizer, [turn], template=template)


def chat_ids(
    tokenizer: Any, messages: Sequence[Message], spelling: Spelling | None = None, template: str | None = None
) -> list[int]:
    """Return the token ids of a chat, up to where the assistant begins its answer.

    spelling: Replaces the marks of videos and images (see `placeholders`) in the rendered text.
    template: The chat template. None: the tokenizer's.

    Raises UserError if the template fails or a text puts control tokens into the prompt. Such tokens are found by
    rendering and encoding the chat a second time, with harmless texts, and comparing. A search in the texts would miss
    some: tokenizers and templates may transform a text before they match control tokens in it.
    """
    text, plain = rendered(tokenizer, [messages, [_plain(message) for message in messages]], template)
    spelled = spelling or str
    ids, its = (encoded(tokenizer, spelled(one)) for one in (text, plain))
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if not entry.content.isspace()}
    control = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    ours, theirs = (Counter(token for token in row if token in control) for row in (ids, its))
    names = tokenizer.convert_ids_to_tokens(sorted(ours - theirs))
    names = names or [mark for mark in (spelling.marks if spelling else ()) if mark and text.count(mark) > plain.count(mark)]
    if names:
        how = "leave it out, or put a space into it"
        raise UserError(f"the question has {', '.join(names)} in it, which would act as a control token: {how}")
    return ids


def _plain(message: Message) -> Message:
    """Replace every text of a message by a harmless one."""
    content = message["content"]
    if not isinstance(content, str):
        return {**message, "content": [{**part, "text": PLAIN} if part["type"] == "text" else part for part in content]}
    return {**message, "content": PLAIN}


def rendered(tokenizer: Any, chats: Sequence[Sequence[Message]], template: str | None = None) -> list[str]:
    """Render the prompt text of each chat. The template is untrusted, so its time and memory are limited.

    Short chats are cached, since jobs and samples often ask the same, and the fork for a rendering takes 25 ms.
    """

    def render() -> str:
        asked: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        return json.dumps(tokenizer.apply_chat_template(list(chats), **asked))

    try:
        return json.loads(_KEPT.get(_key(tokenizer, chats, template), lambda: in_child(render)))
    except ChildError as error:
        raise UserError(f"{tokenizer.name_or_path}: the chat template fails: {error}") from None


def _key(tokenizer: Any, chats: Sequence[Sequence[Message]], template: str | None) -> str | None:
    """Return a cache key: all that the rendered text depends on.

    None if the text must not be cached: the template may render it differently each time, or a part holds pixels.
    """
    source = template or tokenizer.chat_template
    if not isinstance(source, str) or any(word in source for word in UNSTEADY):
        return None
    try:
        return json.dumps([source, tokenizer.special_tokens_map, chats])
    except TypeError:  # a part holds pixels
        return None


def checked(messages: Sequence[Message]) -> list[Part]:
    """Check the messages of a chat and return all their parts in order; a plain text becomes one part.

    Raises UserError for an invalid message.
    """
    found: list[Part] = []
    if not messages:
        raise UserError("a chat needs a message")
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str | list | tuple) or not isinstance(message.get("role"), str):
            raise UserError(f"a message needs a role and a content, a text or a list of parts: got {line(repr(message))}")
        found += [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in found:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "video", "image") or kind not in part:
            kinds = '{"type": "text", "text": …}, or the same with "video" or "image"'
            raise UserError(f"a part of a message must be {kinds}: got {line(repr(part))}")
        if kind == "text" and (not isinstance(part["text"], str) or SURROGATE.search(part["text"])):
            raise UserError(f"expected a text, got {line(repr(part['text']))}")
    return found


def bare(messages: Sequence[Message]) -> list[Message]:
    """Copy a chat's messages without pixels."""

    def of(part: Part) -> Part:
        return part if part["type"] == "text" else {"type": part["type"]}

    return [m if isinstance(m["content"], str) else {**m, "content": [*map(of, m["content"])]} for m in messages]


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Encode a prompt text as the processors do: add the tokenizer's special tokens unless it begins with BOS."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    with explained("the question cannot be encoded"):
        return tokenizer(text, add_special_tokens=not begun)["input_ids"]
