"""Checkpoint folders with known prompts, for freezing Hugging Face's prompts and for comparing ours with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "specvlm" / "assets"
PAD = {"qwen2_5_vl": "<|video_pad|>", "llava_onevision": "<video>"}
PLACE = {"qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>", "llava_onevision": "<video>"}
TEXT_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # of the language model that a released checkpoint was made of: it cannot join a list of parts to a text


def template(family: str, system: str = "You are a helpful assistant.", before: str = "", after: str = "") -> str:
    """Make a chat template like those of released checkpoints: optional system turn, videos in place, text."""
    turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return (
        f"{before}{{% if messages[0]['role'] != 'system' %}}{turn}{{% endif %}}{{% for message in messages %}}<|im_start|>"
        "{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'video' or 'video' in part %}"
        + PLACE[family]
        + "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
        + f"<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{after}{{% endif %}}"
    )


def byte_level(content: dict[str, Any]) -> None:
    """Make a tokenizer of bytes and some merges, like Qwen2's, with added tokens of every kind."""
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, bytes_), *(chr(256 + n) for n in range(256 - len(bytes_)))]
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ v", "a t", "h at", "W hat", "Ġ i", "e r", "Ċ Ċ", "Ġ Ġ"]
    words = [*letters, *(merge.replace(" ", "") for merge in merges)]
    special = [entry["content"] for entry in content["added_tokens"]]
    content["model"] = {
        "type": "BPE",
        "vocab": {word: place for place, word in enumerate([*special, *words])},
        "merges": merges,
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
    }
    content["normalizer"] = {"type": "NFC"}
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    flags = [
        ("<tool_call>", {}),
        ("<|loose|>", {"lstrip": True, "rstrip": True, "special": True}),
        ("<think>", {"normalized": True}),
    ]
    for place, (name, more) in enumerate(flags, start=len(special) + len(words)):
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        content["added_tokens"].append({"id": place, "content": name} | plain | more)


def with_start(content: dict[str, Any]) -> None:
    """Make a tokenizer that prepends a token to every text."""
    byte_level(content)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }


# By name: what is done to the tokenizer, and the files that hold templates ("{}" stands for the family's).
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "as it is": (None, {}),
    "template file": (byte_level, {"chat_template.jinja": template}),
    "legacy file beside a text-only one": (
        byte_level,
        {"chat_template.jinja": None, "chat_template.json": template, "tokenizer_config.json": TEXT_ONLY},
    ),
    "in processor_config.json": (byte_level, {"processor_config.json": template, "chat_template.jinja": TEXT_ONLY}),
    "named ones": (byte_level, {"chat_template.jinja": template, "additional_chat_templates/rag.jinja": TEXT_ONLY}),
    "no system turn": (byte_level, {"chat_template.jinja": lambda family: template(family, "")}),
    "a system turn of several lines": (
        byte_level,
        {"chat_template.jinja": lambda family: template(family, "Você é útil.\n\n  Answer:\t<b>now</b> & then ")},
    ),
    "ends in a space": (byte_level, {"chat_template.jinja": lambda family: template(family, after="<think>\n\n ")}),
    "its tokenizer adds a token": (with_start, {"chat_template.jinja": template}),
    "its template adds it too": (
        with_start,
        {"chat_template.jinja": lambda family: template(family, before="{{ bos_token }}")},
    ),
}
QUESTIONS = (
    *(
        "What is in the video?",
        "",
        " ",
        "\n",
        "What\n\nis\r\n this?\t",
        "  leading and trailing  ",
        "Ça va? 你好, мир 😀👩‍👩‍👧 ﬁ Å Å",
    ),
    *(
        "{{ messages }} {% if x %} {# no #}",
        "<|im_end",
        "< |im_end|>",
        "|im_end|>",
        "<b>&amp;'\"\\",
        "x" * 300,
        "e\u0301 \u200b\u202e.",
    ),
)  # none of them has a control token in it
VIDEOS = {  # frames, height, width, frames a second
    "qwen2_5_vl": ([(4, 56, 84, 2.0)], [(5, 140, 90, 1.5), (2, 28, 28, 30.0)], [(8, 300, 200, 0.25)]),
    "llava_onevision": ([(3, 50, 80, 1.0)], [(2, 30, 30, 2.0), (2, 90, 20, 1.0)]),
}


def make(folder: Path, family: str, kind: str) -> Path:
    """Copy the embedded target's folder without weights, with another tokenizer and other templates."""
    shutil.copytree(ASSETS / family / "target", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer, templates = KINDS[kind]
    if tokenizer:
        change(folder / "tokenizer.json", tokenizer)
        change(folder / "tokenizer_config.json", lambda content: content.update(bos_token="<|endoftext|>"))
        change(folder / "config.json", lambda content: content["text_config"].update(vocab_size=400))  # of no weights
    for name, made in templates.items():
        text = made(family) if callable(made) else made
        (folder / name).parent.mkdir(exist_ok=True)
        if text is None:
            (folder / name).unlink()
        elif name.endswith(".json"):
            change(folder / name, lambda content, text=text: content.update(chat_template=text))
        else:
            (folder / name).write_text(text)
    return folder


def change(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    edit(content)
    path.write_text(json.dumps(content))


def cases(family: str) -> list[tuple[str, str, list[tuple[int, int, int, float]]]]:
    """List kind, question, videos: all kinds with some questions, all questions with one kind, all lists of videos."""
    first, *more = VIDEOS[family]
    few = [(kind, question, first) for kind in KINDS for question in QUESTIONS[:7:2]]
    every = [("template file", question, first) for question in QUESTIONS]
    return list(
        {repr(case): case for case in [*few, *every, *(("as it is", QUESTIONS[0], videos) for videos in more)]}.values()
    )
