"""A built-in family keeps the contract that plugins are held to, and the suite catches what breaks it."""

from __future__ import annotations

from dataclasses import replace

import family_checks as checks
import pytest
import torch
from transformers import AttentionInterface

from specvlm.errors import UserError
from specvlm.models import attention
from specvlm.models.load import load
from specvlm.models.qwen3_vl import Qwen3VL
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe
from specvlm.testing import check_family
from specvlm.testing.family import random_clip
from specvlm.testing.sight import check_sight

FOLDERS = "qwen3_vl"


def positions_slip(monkeypatch):
    """Shift all text after the first video slot back."""
    real = Qwen3VL.positions

    def slipped(self, prompt):
        found = real(self, prompt).clone()
        found[:, prompt.cut :] -= 1
        return found

    monkeypatch.setattr(Qwen3VL, "positions", slipped)


def axes_differ(monkeypatch):
    real = Qwen3VL.positions
    monkeypatch.setattr(Qwen3VL, "positions", lambda self, prompt: real(self, prompt) + torch.arange(3)[:, None])


def runs_are_short(monkeypatch):
    monkeypatch.setattr(Qwen3VL, "runs", lambda self, grid, video: [grid.per_frame] * (grid.frames - 1) + [grid.per_frame - 1])


def levels_are_forgotten(monkeypatch):
    tower = Qwen3VL._tower

    def without(self, *args):
        found = tower(self, *args)
        return replace(found, added=torch.zeros_like(found.added))

    monkeypatch.setattr(Qwen3VL, "_tower", without)


def frames_depend_on_others(monkeypatch):
    real = Qwen3VL.encode_video

    def mixed(self, grid, video, frames, sight=None):
        found = real(self, grid, video, frames, sight)
        return replace(found, rows=found.rows + found.rows.mean())

    monkeypatch.setattr(Qwen3VL, "encode_video", mixed)


def attention_is_not_recorded(monkeypatch):
    tower = Qwen3VL._tower
    monkeypatch.setattr(Qwen3VL, "_tower", lambda self, pixels, thw, sight=None: tower(self, pixels, thw))


def a_slot_is_hidden(monkeypatch):
    """Hide the third slot from all rows: `generate` through our own attention would agree."""
    real = attention.attend

    def hiding(module, query, key, value, attention_mask, **named):
        rows, keys = query.shape[2], key.shape[2]
        causal_QK = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        seen_QK = causal_QK if attention_mask is None else attention_mask.clone()
        seen_QK[..., 2] = False
        return real(module, query, key, value, seen_QK, **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, hiding)
    monkeypatch.setattr(attention, "attend", hiding)  # what `load` registers anew


def tokens_are_swapped(monkeypatch):
    """Swap the features of two tokens of a frame: no answer of the tiny models shows it."""
    real = Qwen3VL.encode_video

    def swapped(self, grid, video, frames, sight=None):
        order = torch.arange(len(grid))
        order[[3, 4]] = order[[4, 3]]
        return real(self, grid, video, frames, sight)[order]

    monkeypatch.setattr(Qwen3VL, "encode_video", swapped)


def generated_tokens_slip(monkeypatch):
    """Give generated tokens, and only them, another position."""
    real = VideoLM.append_hidden

    def slipped(self, tokens, depths, seen, cache, position=None):
        return real(self, tokens, depths, seen, cache, (cache.position if position is None else position) + 40)

    monkeypatch.setattr(VideoLM, "append_hidden", slipped)


def recording(change):
    """Make a fault that changes the record of a pass of the tower, (N, C) with attention in front."""

    def fault(monkeypatch):
        real = VisionProbe.add
        monkeypatch.setattr(VisionProbe, "add", lambda self, rows_NC: real(self, change(rows_NC)))

    return fault


def per_frame(change):
    """Change the record of each frame; frames of the check's videos have 12 tokens."""
    return lambda rows_NC: change(rows_NC.unflatten(0, (-1, 12))).flatten(0, 1)


def attention_alone(change):
    return lambda rows_NC: torch.cat([change(rows_NC[:, :1]), rows_NC[:, 1:]], 1)


APART = "attention depend on other frames, or belong to another"
RECORDS = [
    (torch.zeros_like, "video: the recorded attention of 36 of 36 tokens is not above 0"),
    (lambda rows_NC: rows_NC.nan_to_num() / 0 * 0, "video: the recorded attention or keys are not finite"),
    (lambda rows_NC: 30 * rows_NC, "video: the recorded attention of a frame sums to 7.5; it is a share"),
    (
        lambda rows_NC: torch.cat([rows_NC[:, :1], torch.ones(len(rows_NC), 3)], 1),
        "video: all tokens have the same recorded key",
    ),
    (lambda rows_NC: rows_NC.flip(0), f"video: a frame's recorded {APART}"),
    (attention_alone(lambda rows_N1: rows_N1.flip(0)), f"video: a frame's recorded {APART}"),
    (lambda rows_NC: rows_NC + 0.01 * rows_NC.std(), f"video: a frame's recorded {APART}"),
    (per_frame(lambda rows_FPC: rows_FPC.flip(1)), r"video: where the features of token 0 .* recorded key of token 11 does"),
    (attention_alone(per_frame(lambda rows_FP1: rows_FP1.flip(1))), "video: the recorded attention does not move where"),
    (per_frame(lambda rows_FPC: rows_FPC[:, [0, 1, 2, 4, 3, *range(5, 12)]]), "video: where the features of token [34] .* key"),
]


@pytest.fixture(scope="module")
def target():
    return load(checks.folder(FOLDERS) / "target", "float32")


@pytest.mark.parametrize(("change", "said"), RECORDS)
def test_a_wrong_record_of_attention_is_caught(target, change, said, monkeypatch):
    with torch.inference_mode():
        check_sight(target, random_clip(6), "video")
        recording(change)(monkeypatch)
        with pytest.raises(AssertionError, match=said):
            check_sight(target, random_clip(6), "video")


@pytest.mark.slow
def test_a_built_in_family_keeps_the_contract():
    assert check_family(checks.folder(FOLDERS) / "target", checks.folder(FOLDERS) / "small") == 7 * 14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (positions_slip, r"video: the logits of row \d+ \(text\) differ from those of transformers' forward"),
        (generated_tokens_slip, "text: the target alone: gives .* and transformers' generate"),
        (tokens_are_swapped, r"video: the logits of row \d+ \(video token [34]\) differ from those of transformers' forward"),
        (recording(lambda rows_NC: rows_NC.flip(0)), f"video: a frame's recorded {APART}"),
        (recording(torch.zeros_like), "video: the recorded attention of 36 of 36 tokens is not above 0"),
        (recording(lambda rows_NC: rows_NC[1:]), r"video: the probe has \(35,\) attention and 35 keys of 36 tokens"),
        (axes_differ, "text: text after the last slot has unequal positions on its axes"),
        (runs_are_short, r"grids of \[4\] tokens do not fill 3 video slots"),  # when the target is loaded
        (levels_are_forgotten, r"image: the logits of row \d+ \(image token \d+\) differ from those of transformers' forward"),
        (frames_depend_on_others, "video: a frame's features depend on which other frames are encoded"),
        (attention_is_not_recorded, "video: encode_video is given `sight` and adds nothing to it: call sight.add"),
        (a_slot_is_hidden, r"text: the logits of row \d+ \(text\) differ from those of transformers' forward"),
    ],
)
def test_what_breaks_it_is_caught_and_named(fault, said, monkeypatch):
    folder = checks.folder(FOLDERS)
    fault(monkeypatch)
    with pytest.raises((AssertionError, UserError), match=said):
        check_family(folder / "target", folder / "small")
