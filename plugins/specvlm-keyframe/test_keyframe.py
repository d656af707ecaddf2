"""Keyframe: one whole frame a scene, the rest of the budget in the shortest scene."""

import pytest
import torch
from specvlm_keyframe import KeyframePruner

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.parametrize("fields", [{}, {"pick": "medoid"}], ids=str)
def test_contract(fields):
    check_pruner(KeyframePruner, **fields)


def scenes(lengths):
    """Frames of 2 x 2 tokens: each scene a direction of its own, its frames turning a little."""
    frames = []
    for scene, length in enumerate(lengths):
        for f in range(length):
            frames.append(torch.eye(8)[scene] + 0.1 * f * torch.eye(8)[7])
    x_ND = torch.stack(frames).repeat_interleave(4, dim=0)
    return TokenGrid(len(frames), 2, 2), {"features": x_ND}


def frames_of(index):
    return (index // 4).unique().tolist()


@pytest.mark.parametrize(("pick", "expected"), [("first", [0, 3, 8]), ("medoid", [1, 5, 8])])
def test_the_key_frames_are_one_of_each_scene_in_full(pick, expected):
    grid, signals = scenes([3, 5, 1])
    index = KeyframePruner(pick).select(PruneContext((grid,), 12, signals)).index
    assert len(index) == 12 and frames_of(index) == expected


def test_what_is_left_of_the_budget_thins_out_the_frame_of_the_shortest_scene():
    grid, signals = scenes([3, 2, 5])
    index = KeyframePruner().select(PruneContext((grid,), 10, signals)).index
    assert index.tolist() == [0, 1, 2, 3, 12, 15, 20, 21, 22, 23]


@pytest.mark.parametrize("budget", range(1, 40))
def test_the_budget_is_met_exactly(budget):
    grid, signals = scenes([3, 5, 2])
    assert len(KeyframePruner().select(PruneContext((grid,), budget, signals))) == budget
