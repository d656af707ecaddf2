"""The contract, and the merge against a naive loop over tokens."""

import math

import pytest
import torch
from rounding import assert_same_sums
from specvlm_visionzip import VisionZipPruner

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import KeepSet, TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"dominant": 0.4}, {"dominant": 1.0}])
def test_contract(fields):
    check_pruner(VisionZipPruner, **fields)


def context(grids, budget, seed=0):
    generator, total = torch.Generator().manual_seed(seed), sum(map(len, grids))
    signals = {
        "vision_attention": torch.rand(total, generator=generator),
        "vision_keys": torch.randn(total, 8, generator=generator, dtype=torch.float64),
    }
    return PruneContext(grids, budget, signals)


def naive(ctx, tenths):
    """{position: members} of a video without newline tokens, token by token. tenths: dominant share of a frame."""
    attention, features = ctx.signals["vision_attention"].tolist(), ctx.signals["vision_keys"].tolist()
    grid, budget, found = ctx.grid, ctx.budget, {}
    for frame in range(grid.frames):
        size = grid.per_frame
        k = (frame + 1) * budget // grid.frames - frame * budget // grid.frames
        if not k:
            continue
        tokens = range(frame * size, (frame + 1) * size)
        count = min(k, max(1, (2 * tenths * k + 10) // 20))
        best = sorted(tokens, key=lambda i: (-attention[i], i))[:count]
        found |= {i: [i] for i in best}
        rest = [i for i in tokens if i not in best]
        targets = [rest[c * len(rest) // (k - count)] for c in range(k - count)]
        found |= {i: [i] for i in targets}
        for i in rest:
            if i not in targets and targets:
                near = [cosine(features[i], features[j]) for j in targets]
                found[targets[near.index(max(near))]].append(i)
    return found


def cosine(x, y):
    product, size = sum(a * b for a, b in zip(x, y, strict=True)), math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return product / size


@pytest.mark.parametrize("tenths", [8, 5, 2, 10])
@pytest.mark.parametrize("kind", ["random", "ties", "static", "alternating", "one frame"])
def test_the_merge_equals_a_naive_loop_and_is_a_mean(kind, tenths):
    grid = TokenGrid(1 if kind == "one frame" else 5, 3, 4)
    for budget in {1, 3, 7, len(grid) // 2, len(grid) - 1}:
        ctx = context((grid,), budget, seed=budget)
        keys = ctx.signals["vision_keys"].repeat(1, 8).cumsum(1).sign()  # 64 numbers of 1 or -1: no cosine is rounded
        if kind == "ties":
            ctx.signals["vision_attention"] = (3 * ctx.signals["vision_attention"]).round()
        if kind in ("static", "alternating"):
            scene_F = torch.arange(grid.frames) % (1 if kind == "static" else 2)
            keys = keys.view(grid.frames, -1, 64)[scene_F].flatten(0, 1)
        ctx.signals["vision_keys"] = keys
        keep, wanted = VisionZipPruner(tenths / 10).select(ctx), naive(ctx, tenths)
        assert keep.index.tolist() == sorted(wanted) and len(keep) == budget
        merged = (keep.pool.to_dense().double() @ keys).float()  # the weights are float32
        for row, position in zip(merged, keep.index.tolist(), strict=True):
            assert_same_sums(row, keys[wanted[position]].mean(0), len(wanted[position]) + 1, keys)
        assert_same_sums(keep.pool.to_dense().sum(1), torch.ones(len(keep)), ctx.total)


def test_the_default_is_the_papers_and_a_half_is_rounded_up():
    for budget, dominant in ((64, 54), (32, 27), (16, 14), (1, 1)):
        attention = torch.rand(1, 300, generator=torch.Generator().manual_seed(0))
        (best, _), *_ = VisionZipPruner().frame_parts(attention, torch.ones(1, 300, 2), budget)
        assert best.shape == (1, dominant)


@pytest.mark.parametrize("budget", [1, 5, 16, 25, 27])
def test_no_token_is_in_two_means_and_frames_share_evenly(budget):
    grids = (TokenGrid(3, 2, 3, newline=1), TokenGrid(2, 1, 4, newline=1))
    keep = VisionZipPruner(0.5).select(context(grids, budget))
    assert len(keep) == budget and int((keep.pool.to_dense() > 0).sum(0).max()) == 1
    frames = [range(0, 6), range(6, 12), range(12, 18), range(19, 23), range(23, 27)]
    shares = [sum(i in frame for i in keep.index.tolist()) / len(frame) for frame in frames]
    assert max(shares) - min(shares) <= 0.3


def test_the_scale_does_not_grow():
    grid = TokenGrid(2, 4, 4)
    ctx = PruneContext((grid,), 8, {"vision_attention": torch.rand(32), "vision_keys": torch.ones(32, 3)})
    keep: KeepSet = VisionZipPruner(0.5).select(ctx)
    assert_same_sums(keep.pool.to_dense() @ torch.ones(32, 3), torch.ones(8, 3), 32)
