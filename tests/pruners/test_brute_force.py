"""The simple pruners against plain loops, from one token to all, with ties, one frame, still and alternating scenes."""

import random

import pytest
import torch

from specvlm.strategies import PruneContext
from specvlm.strategies.pruners import FastVPruner, RandomPruner, UniformPruner, VerifierAttentionPruner, WindowPruner
from specvlm.types import TokenGrid

KINDS = ["random", "ties", "static", "alternating", "one frame"]


def videos(kind):
    """Ten grids each, with whole-numbered attention of 4 layers: (L, N)."""
    for seed in range(10):
        draw = random.Random(seed)
        grid = TokenGrid(1 if kind == "one frame" else draw.choice((3, 4, 7)), 2, 3, newline=seed % 2)
        scenes = {"static": 1, "alternating": 2}.get(kind, grid.frames)
        levels = 2 if kind == "ties" else 1000
        frames = [[[draw.randint(0, levels) for _ in range(6)] for _ in range(scenes)] for _ in range(4)]
        rows = [[value for f in range(grid.frames) for value in layer[f % scenes]] + [0] * grid.newline for layer in frames]
        yield grid, rows


def kept(pruner, grid, budget, **signals):
    signals = {name: torch.tensor(signal, dtype=torch.float32) for name, signal in signals.items()}
    return pruner.select(PruneContext((grid,), budget, signals, torch.Generator().manual_seed(budget))).index.tolist()


def highest(scores, budget):
    """One at a time, the earlier of equals."""
    left, found = dict(enumerate(scores)), []
    for _ in range(budget):
        found.append(max(left, key=lambda i: (left[i], -i)))
        del left[found[-1]]
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_alone_keeps_the_highest(kind):
    for grid, rows in videos(kind):
        mean = [sum(column) for column in zip(*rows, strict=True)]
        for budget in range(1, len(grid) + 1, 4):
            assert kept(VerifierAttentionPruner(), grid, budget, verifier_attention=mean) == highest(mean, budget)
            for layer in (1, 2, 4):
                expected = highest(rows[layer - 1], budget)
                assert kept(FastVPruner(layer), grid, budget, verifier_attention_last_row=rows) == expected
                assert kept(FastVPruner(layer, "draft"), grid, budget, draft_attention_last_row=rows) == expected


def test_fastv_reads_layer_two_by_default():
    assert kept(FastVPruner(), TokenGrid(1, 1, 3), 1, verifier_attention_last_row=[[9, 0, 0], [0, 9, 0], [0, 0, 9]]) == [1]


@pytest.mark.parametrize("frames", [1, 3, 4, 7, 16])
def test_strides_and_windows(frames):
    grid = TokenGrid(frames, 2, 3, newline=1)
    total = len(grid)
    for budget in range(1, total + 1):
        even = [0] if budget == 1 else [i * (total - 1) // (budget - 1) for i in range(budget)]
        assert kept(UniformPruner(), grid, budget) == even and (budget == 1 or even[-1] == total - 1)
        before = {"front": 0, "back": total - budget}
        for where, start in before.items():
            assert kept(WindowPruner(where), grid, budget) == [*range(start, start + budget)]
        middle = kept(WindowPruner(), grid, budget)
        left, right = middle[0], total - 1 - middle[-1]
        assert middle == [*range(left, left + budget)] and right - left in (0, 1)


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_random_subset_is_the_beginning_of_one_permutation(frames):
    grid = TokenGrid(frames, 2, 3)
    for budget in range(1, len(grid) + 1):
        order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(budget)).tolist()
        assert kept(RandomPruner(), grid, budget) == sorted(order[:budget])
