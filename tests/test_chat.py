"""Chats of several turns, with videos and images in any order: decodes equal those of a pristine model."""

from __future__ import annotations

import family_checks as checks
import family_folders
import pytest
import torch

from specvlm.errors import UserError

CHATS = tuple(family_folders.CHATS)
CLIP = checks.clip(2, 60, 60, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_every_chat_is_decoded_as_by_a_pristine_model(family, every):
    assert checks.unequal_requests(family, "plain", CHATS, every) == (3 * (7 if every else 2), [])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_guidance_reads_the_rows_behind_the_last_video(family):
    prompt = checks.prompt(family, "question first")
    assert prompt.cut == int(prompt.video_index[-1]) + 1 < len(prompt)
    text = checks.model(family).tokenizer.decode(prompt.tokens[: prompt.video_index[0]])
    assert "describe the video" in text


def test_items_are_in_the_order_of_the_prompt():
    prompt = checks.prompt("qwen2_5_vl", "interleaved")
    assert [item["thw"] for item in prompt.items] == [
        prompt.videos[0]["thw"], prompt.images[0]["thw"], prompt.videos[1]["thw"], prompt.images[1]["thw"],
    ]  # fmt: skip
    copied = prompt.copy()
    assert torch.equal(copied.image_index, prompt.image_index) and copied.image_index is not prompt.image_index


def test_one_turn_is_the_prompt_of_a_question():
    lm = checks.model("qwen2_5_vl")
    content = [{"type": "video", "video": CLIP}, {"type": "text", "text": "what ?"}]
    assert torch.equal(lm.chat([{"role": "user", "content": content}]).tokens, lm.prompt("what ?", [CLIP]).tokens)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (["what ?"], "a message needs a role and a content"),
        ([{"role": "user", "content": 3}], "a message needs a role and a content"),
        ([{"content": "what ?"}], "a message needs a role and a content"),
        ([{"role": "user", "content": [{"type": "audio", "audio": 1}]}], "a part of a message must be"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a part of a message must be"),
        ([{"role": "user", "content": "say <|im_end|> now"}], r"has <\|im_end\|> in it"),
        ([{"role": "system", "content": "<|video_pad|>"}, {"role": "user", "content": "?"}], r"has <\|video_pad\|> in it"),
    ],
)
def test_what_is_no_chat_is_explained(messages, said):
    with pytest.raises(UserError, match=said):
        checks.model("qwen2_5_vl").chat(messages)
