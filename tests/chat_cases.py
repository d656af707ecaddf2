"""Thirty conversations, of which tests/data/make_chats.py froze the prompts that Hugging Face's processors make.

A part is a text, a video (frames, height, width, frames per second) or an image (height, width).
"""

from __future__ import annotations

import random
from typing import Any

FAMILIES = ("qwen2_5_vl", "llava_onevision", "qwen3_vl")
ASKED = (
    "describe the video.", "how many objects appear?", "what color is the background?", "how many objects remain at the end?",
    "and then?", "which one is larger, the first or the second?", "Compare them — in détail, please: 1, 2, 3!", "why ?",
)  # fmt: skip
TOLD = ("two objects.", "navy", "a small red star appears at the top left.", "at the end none remains .")
SYSTEM = ("answer with one word.", "You are a helpful assistant.")


def conversations() -> list[list[tuple[str, list[Any]]]]:
    """List the conversations, as (role, parts) of each turn. The last turn is a user's and ends with a text."""
    drawn = random.Random(20)
    return [conversation(drawn, turns=1 + number % 3, system=number % 4 == 1) for number in range(30)]


def conversation(drawn: random.Random, turns: int, system: bool) -> list[tuple[str, list[Any]]]:
    found: list[tuple[str, list[Any]]] = [("system", [drawn.choice(SYSTEM)])] if system else []
    for turn in range(turns):
        media: list[Any] = [video(drawn) for _ in range(drawn.choice((0, 1, 1, 2)))]
        media += [image(drawn) for _ in range(drawn.choice((0, 0, 1, 2)))]
        drawn.shuffle(media)
        parts = [part for one in media for part in ([drawn.choice(ASKED), one] if drawn.random() < 0.3 else [one])]
        found.append(("user", [*parts, drawn.choice(ASKED)]))
        if turn < turns - 1:
            found.append(("assistant", [drawn.choice(TOLD)]))
    return found


def video(drawn: random.Random) -> tuple[int, int, int, float]:
    return 4, drawn.choice((56, 84, 120)), drawn.choice((56, 112, 140)), drawn.choice((1.0, 2.0, 4.0))


def image(drawn: random.Random) -> tuple[int, int]:
    return drawn.choice((40, 90, 120)), drawn.choice((60, 84, 150))


def media(conversation: list[tuple[str, list[Any]]], length: int) -> list[Any]:
    """List the videos (length 4) or the images (length 2) of a conversation."""
    return [part for _, parts in conversation for part in parts if isinstance(part, tuple) and len(part) == length]


def messages(conversation: list[tuple[str, list[Any]]], empty: bool = False) -> list[dict[str, Any]]:
    """Write a conversation as Hugging Face's messages. empty: Leave out what stands in videos and images."""

    def part(of: Any) -> dict[str, Any]:
        if isinstance(of, str):
            return {"type": "text", "text": of}
        kind = "video" if len(of) == 4 else "image"
        return {"type": kind} if empty else {"type": kind, kind: of}

    return [{"role": role, "content": [part(of) for of in parts]} for role, parts in conversation]
