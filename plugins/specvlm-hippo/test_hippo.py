"""HIPPO: each of its three scores against a naive loop, and their weighted sum."""

import pytest
import torch
from rounding import assert_same_sums
from specvlm_hippo import HippoPruner, novelties, scaled, varieties
from torch.nn.functional import cosine_similarity

from specvlm.errors import UserError
from specvlm.strategy import PruneContext
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
