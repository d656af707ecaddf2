"""Keyframe: one whole frame per scene, the rest of the budget in the shortest scene."""

import math
from itertools import pairwise

import pytest
import torch
from specvlm_keyframe import KeyframePruner

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.parametrize("fields", [{}, {"pick": "medoid"}], ids=str)
def test_contract(fields):
    check_pruner(KeyframePruner, **fields)


def scenes(lengths):
    """Frames of 2 x 2 tokens: each scene has its own direction, and its frames turn slightly."""
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


def naive(means, per_frame, budget, pick):
    """Tokens kept, with scenes cut at the least similar neighbours one by one."""
    alike = [(round(cosine(a, b), 5), f) for f, (a, b) in enumerate(pairwise(means))]
    wanted = math.ceil(budget / per_frame)
    starts = [0, *sorted(f + 1 for _, f in sorted(alike)[: wanted - 1])]
    scenes = [list(range(a, b)) for a, b in pairwise([*starts, len(means)])]
    keys = []
    for scene in scenes:
        middle = [sum(means[f][d] for f in scene) / len(scene) for d in range(len(means[0]))]
        keys.append(scene[0] if pick == "first" else max(scene, key=lambda f: (round(cosine(means[f], middle), 5), -f)))
    shortest = max(range(wanted), key=lambda s: (-len(scenes[s]), s))
    kept = []
    for s, key in enumerate(keys):
        room = budget - (wanted - 1) * per_frame if s == shortest else per_frame
        kept += [key * per_frame + (i * (per_frame - 1) // (room - 1) if room > 1 else 0) for i in range(room)]
    return sorted(kept)


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


@pytest.mark.parametrize("pick", ["first", "medoid"])
@pytest.mark.parametrize("kind", ["random", "static", "alternating", "one frame"])
def test_it_equals_a_brute_force(kind, pick):
    for seed in range(7):
        frames = 1 if kind == "one frame" else 5 + seed
        scene_F = torch.arange(frames) % {"static": 1, "alternating": 2}.get(kind, frames)
        x_FD = torch.randn(frames, 16, generator=torch.Generator().manual_seed(seed))[scene_F]
        signals = {"features": x_FD.repeat_interleave(4, dim=0)}  # the mean of four equal ones is exact
        for budget in {1, 4, 6, 2 * frames, 4 * frames - 1}:
            index = (
                KeyframePruner(pick)
                .select(PruneContext((TokenGrid(frames, 2, 2),), min(budget, 4 * frames - 1), signals))
                .index
            )
            assert index.tolist() == naive(x_FD.tolist(), 4, min(budget, 4 * frames - 1), pick)
