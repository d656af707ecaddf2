"""Conversations make the prompts that Hugging Face's own processors make, as frozen by tests/data/make_chats.py."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from chat_cases import FAMILIES, conversations, media, messages
from covering import sampled

from specvlm import Clip
from specvlm.config import model_folder
from specvlm.models.load import skeleton
from specvlm.models.video_lm import VideoLM
from specvlm.session.inputs import read
from specvlm.session.options import Options

FROZEN = json.loads((Path(__file__).parents[1] / "data" / "chats.json").read_text())


@cache
def model(family: str) -> VideoLM:
    return skeleton(model_folder(f"embedded:{family}/target"))


def black(count: int, height: int, width: int, fps: float) -> Clip:
    pixels = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    return Clip(pixels, tuple(place / fps for place in range(count)), fps, "", count, fps)


def spelt_out(runs: list) -> list[int]:
    return [token for run in runs for token in ([run[0]] * run[1] if isinstance(run, list) else [run])]


@pytest.mark.parametrize(("number", "family"), sampled(range(30), FAMILIES))
def test_a_conversation_makes_the_prompt_of_hugging_faces_processor(family, number):
    (case,) = [case for case in FROZEN if (case["family"], case["number"]) == (family, number)]
    conversation = conversations()[number]
    clips = [black(*video) for video in media(conversation, 4)]
    pictures = [torch.zeros(3, *image, dtype=torch.uint8) for image in media(conversation, 2)]
    found = read(model(family), messages(conversation, empty=True), clips, pictures, Options())
    assert found.prompt.tokens.tolist() == spelt_out(case["ids"])
    assert found.frames == 4 * len(clips)


def test_the_conversations_are_of_every_kind():
    every = conversations()
    assert len(every) == 30 and {len(one) for one in every} >= {1, 2, 3, 5}
    assert {len(media(one, 4)) for one in every} >= {0, 1, 2, 3} and {len(media(one, 2)) for one in every} >= {0, 1, 2}
    assert any(media(one[:-1], 4) and not media(one[-1:], 4) for one in every)  # a question about an earlier turn's video
