"""A built-in family keeps the contract that plugins are held to, and the suite catches what breaks it."""

from __future__ import annotations

from dataclasses import replace

import family_checks as checks
import pytest
import torch
from transformers import AttentionInterface

from specvlm.errors import UserError
from specvlm.models import attention
from specvlm.models.qwen3_vl import Qwen3VL
from specvlm.testing import check_family

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
    monkeypatch.setattr(Qwen3VL, "runs", lambda self, grid: [grid.per_frame] * (grid.frames - 1) + [grid.per_frame - 1])


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
    monkeypatch.setattr("specvlm.models.vision_probe.VisionProbe.attention", lambda self: torch.zeros(0))
    monkeypatch.setattr("specvlm.models.vision_probe.VisionProbe.keys", lambda self: torch.zeros(0))


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


@pytest.mark.slow
def test_a_built_in_family_keeps_the_contract():
    assert check_family(checks.folder(FOLDERS) / "target", checks.folder(FOLDERS) / "small") == 7 * 14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (positions_slip, "video.*: gives .* and transformers' generate"),
        (axes_differ, "text: text after the last slot has unequal positions on its axes"),
        (runs_are_short, r"grids of \[4\] tokens do not fill 3 video slots"),  # when the target is loaded
        (levels_are_forgotten, "image: the target alone: gives .* and transformers' generate"),
        (frames_depend_on_others, "video: a frame's features depend on which other frames are encoded"),
        (attention_is_not_recorded, "video: the probe has .* attention and 0 keys of 36 tokens"),
        (a_slot_is_hidden, "text: the target alone: gives .* and transformers' generate"),
    ],
)
def test_what_breaks_it_is_caught_and_named(fault, said, monkeypatch):
    folder = checks.folder(FOLDERS)
    fault(monkeypatch)
    with pytest.raises((AssertionError, UserError), match=said):
        check_family(folder / "target", folder / "small")
