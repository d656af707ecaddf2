"""HIPPO: each of its three scores against a naive loop, and their weighted sum."""

import math

import pytest
import torch
from rounding import assert_same_sums, rounding
from specvlm_hippo import HippoPruner, novelties, scaled, varieties
from torch.nn.functional import cosine_similarity

from specvlm.errors import UserError
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.parametrize("fields", [{}, {"attention": 0.0, "crop": 5}], ids=str)
def test_contract(fields):
    check_pruner(HippoPruner, **fields)


@pytest.mark.parametrize("crop", [3, 5])
@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 1, 1), (3, 1, 4), (2, 2, 1)])
def test_variety_is_the_variance_of_cosines_to_the_neighbours(shape, crop):
    x_FHWD = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames, height, width = shape
    got = varieties(x_FHWD, crop)
    for f in range(frames):
        for i in range(height):
            for j in range(width):
                rows, columns = range(max(i - crop // 2, 0), i + crop // 2 + 1), range(max(j - crop // 2, 0), j + crop // 2 + 1)
                around = [(a, b) for a in rows for b in columns if a < height and b < width and (a, b) != (i, j)]
                cosines = [cosine_similarity(x_FHWD[f, i, j], x_FHWD[f, a, b], dim=0) for a, b in around]
                expected = torch.stack(cosines).var(correction=0) if around else torch.zeros((), dtype=torch.float64)
                assert_same_sums(got[f, i, j], expected, terms=3 * 6 + 2 * crop**2, size=1)


def test_novelty_is_the_distance_to_the_frame_before():
    x_FPD = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = [1 - cosine_similarity(x_FPD[a], x_FPD[b], dim=-1) for a, b in ((0, 1), (1, 0), (2, 1))]
    assert_same_sums(novelties(x_FPD), torch.stack(expected), terms=3 * 6, size=1)


def test_scores_are_scaled_frame_by_frame():
    assert scaled(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])).tolist() == [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]


def naive(x, attention, grid, crop, weights):
    """Score of each token of nested lists (frame, cell), with plain loops."""
    scores = []
    for f in range(grid.frames):
        before = f - 1 if f else 1
        change = [1 - cosine(x[f][p], x[before][p]) if grid.frames > 1 else 0.0 for p in range(grid.per_frame)]
        variety = []
        for p in range(grid.per_frame):
            row, column = divmod(p, grid.width)
            around = [
                cosine(x[f][p], x[f][a * grid.width + b])
                for a in range(max(row - crop // 2, 0), min(row + crop // 2 + 1, grid.height))
                for b in range(max(column - crop // 2, 0), min(column + crop // 2 + 1, grid.width))
                if (a, b) != (row, column)
            ]
            mean = sum(around) / max(len(around), 1)
            variety.append(sum((c - mean) ** 2 for c in around) / max(len(around), 1))
        parts = [unit(values) for values in (attention[f], change, variety)]
        scores += [sum(w * part[p] for w, part in zip(weights, parts, strict=True)) for p in range(grid.per_frame)]
    return scores


def unit(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high - low > 1e-6 else 0.0 for v in values]


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


@pytest.mark.parametrize("kind", ["random", "ties", "static", "alternating", "one frame"])
def test_kept_tokens_are_the_highest_of_a_brute_force(kind):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        grid = TokenGrid(1 if kind == "one frame" else (5, 4)[seed % 2], 3, 4)
        x_FPD = torch.randn(grid.frames, 12, 16, generator=generator).sign()  # their cosines are far apart or equal
        attention_FP = torch.randint(9, (grid.frames, 12), generator=generator).float()
        if kind == "ties":
            x_FPD, attention_FP = x_FPD[:, :, :1].expand(-1, -1, 16), (attention_FP > 4).float()
        if kind in ("static", "alternating"):
            x_FPD = x_FPD[torch.arange(grid.frames) % (1 if kind == "static" else 2)]
        weights, crop = ((1.0, 1.0, 1.0), 3) if seed % 2 else ((2.0, 1.0, 0.5), 5)
        scores_N = torch.tensor(naive(x_FPD.tolist(), attention_FP.tolist(), grid, crop, weights), dtype=torch.float64)
        for budget in (1, len(grid) // 3, len(grid) - 1):
            signals = {"features": x_FPD.flatten(0, 1).contiguous(), "verifier_attention": attention_FP.flatten()}
            index = HippoPruner(*weights, crop).select(PruneContext((grid,), budget, signals)).index
            dropped = torch.ones(len(grid), dtype=torch.bool).index_fill(0, index, False)
            # Equal scores differ by rounding in float32; a range below 1 / 64 would magnify the difference.
            slack = rounding(3 * 16 + 2 * crop**2, 64 * sum(weights), torch.float32)
            assert len(index) == budget and scores_N[index].min() >= scores_N[dropped].max() - slack


def test_equal_scores_go_to_the_earlier_token():
    ctx = PruneContext((TokenGrid(3, 2, 2),), 5, {"features": torch.ones(12, 4), "verifier_attention": torch.ones(12)})
    assert HippoPruner().select(ctx).index.tolist() == [0, 1, 2, 3, 4]


def test_kept_tokens_are_the_top_of_the_weighted_sum():
    generator = torch.Generator().manual_seed(2)
    x_ND, attention_N = torch.randn(60, 6, generator=generator), torch.rand(60, generator=generator)
    ctx = PruneContext((TokenGrid(5, 3, 4),), 17, {"features": x_ND, "verifier_attention": attention_N})
    x_FPD = x_ND.view(5, 12, 6)
    variety = varieties(x_FPD.view(5, 3, 4, 6), 3).flatten(1)
    score = 2 * scaled(attention_N.view(5, 12)) + scaled(novelties(x_FPD)) + 0.5 * scaled(variety)
    index = HippoPruner(attention=2.0, novelty=1.0, variety=0.5).select(ctx).index
    assert index.tolist() == sorted(score.flatten().topk(17).indices.tolist())


def test_rounding_is_no_novelty():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.rand(1, 64, generator=generator) * (0.1 + torch.rand(24, 1, generator=generator))  # one direction, 24 lengths
    assert novelties(x_ND.view(2, 12, 64)).unique().numel() > 1
    ctx = PruneContext((TokenGrid(2, 3, 4),), 5, {"features": x_ND, "verifier_attention": torch.ones(24)})
    assert HippoPruner().select(ctx).index.tolist() == [0, 1, 2, 3, 4]


def test_an_even_crop_is_refused():
    with pytest.raises(UserError, match="3, 5, 7"):
        HippoPruner(crop=4)
