"""Turn a question into prompt tokens with the checkpoint's tokenizer and chat template.

Does what Hugging Face's processors do, without torchvision, which they need.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specvlm.errors import UserError, explained
from specvlm.process.child import ChildError, in_child
from specvlm.video.settings import read_json

PLAIN = "x"  # a question that no tokenizer can read as anything but text


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


def prompt_ids(
    tokenizer: Any, content: Sequence[dict[str, Any]], question: str, spelled: Callable[[str], str] = str
) -> list[int]:
    """Return the token ids of a user turn, `content` followed by the question, up to where the assistant begins.

    spelled: Replaces the marks of videos and images in the rendered text.

    Raises UserError if the template fails or the question puts control tokens into the prompt. Those are found by
    comparing the token ids with those of a harmless question: tokenizers and templates may transform a text before they
    match control tokens in it.
    """
    text, plain = map(spelled, rendered(tokenizer, content, (question, PLAIN)))
    ids = encoded(tokenizer, text)
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if not entry.content.isspace()}
    control = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    ours, theirs = (Counter(token for token in row if token in control) for row in (ids, encoded(tokenizer, plain)))
    if more := ours - theirs:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(more)))
        how = "leave it out, or put a space into it"
        raise UserError(f"the question has {names} in it, which would act as a control token: {how}")
    return ids


def rendered(tokenizer: Any, content: Sequence[dict[str, Any]], questions: Sequence[str]) -> list[str]:
    """Render the prompt text of each question. The template is untrusted, so its time and memory are limited."""
    chats = [[{"role": "user", "content": [*content, {"type": "text", "text": asked}]}] for asked in questions]

    def render() -> str:
        return json.dumps(tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))

    try:
        return json.loads(in_child(render))
    except ChildError as error:
        raise UserError(f"{tokenizer.name_or_path}: the chat template fails: {error}") from None


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Encode a prompt text as the processors do: add the tokenizer's special tokens unless it begins with BOS."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    with explained("the question cannot be encoded"):
        return tokenizer(text, add_special_tokens=not begun)["input_ids"]
