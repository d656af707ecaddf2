"""The contract, the raters token by token, and the stages one after the other."""

import math

import pytest
import torch
from specvlm_sparsevlm import SparseVLMPruner

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import KeepSet, TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"layers": (40,), "schedule": (1.0,)}, {"layers": (0, 1), "schedule": (9.5, 1.0)}])
def test_contract(fields):
    check_pruner(SparseVLMPruner, **fields)


def test_raters_are_the_words_above_the_mean_of_the_softmax_over_text():
    generator = torch.Generator().manual_seed(1)
    text, video = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    shares = [0.0] * 7
    for v in video.tolist():
        products = [math.exp(sum(a * b for a, b in zip(v, x, strict=True))) for x in text.tolist()]
        shares = [share + p / sum(products) / 11 for share, p in zip(shares, products, strict=True)]
    mean = sum(shares) / 7
    wanted = [float(share > mean) for share in shares]
    assert SparseVLMPruner().row_weights(text, video).tolist() == wanted and 0 < sum(wanted) < 7


def test_a_word_that_has_to_do_with_the_video_rates_and_a_filler_does_not():
    video = torch.eye(4)[:2].repeat(3, 1)
    text = torch.stack([5 * torch.eye(4)[0], 5 * torch.eye(4)[1], torch.eye(4)[2], torch.eye(4)[3]])
    assert SparseVLMPruner().row_weights(text, video).tolist() == [1, 1, 0, 0]


def test_equal_words_all_rate():
    assert SparseVLMPruner().row_weights(torch.ones(3, 4), torch.ones(2, 4)).tolist() == [1, 1, 1]


def naive(scores_LN, budget):
    """The three stages of 300, 200 and 110 tokens, one after the other, in integers."""
    left = list(range(scores_LN.shape[1]))
    for layer, tokens in ((2, 300), (6, 200), (15, 110)):
        scores = scores_LN[min(layer, len(scores_LN) - 1)].tolist()
        left = sorted(sorted(left, key=lambda i: (-scores[i], i))[: budget * tokens // 110])
    return left


@pytest.mark.parametrize("levels", [2, 5, 1000])  # with few levels most scores tie
def test_stages_equal_a_brute_force(levels):
    generator = torch.Generator().manual_seed(levels)
    for frames, layers in ((1, 28), (5, 28), (7, 4), (4, 16)):
        scores_LN = torch.randint(levels, (layers, 12 * frames), generator=generator).float()
        for budget in (1, 3, 11, 5 * frames, 12 * frames - 1):
            ctx = PruneContext((TokenGrid(frames, 3, 4),), budget, {"verifier_attention_weighted": scores_LN})
            keep = SparseVLMPruner().select(ctx).index.tolist()
            assert keep == naive(scores_LN, min(budget, 12 * frames)) and len(keep) == min(budget, 12 * frames)


def test_every_budget_is_thinned_out_in_whole_numbers():
    assert SparseVLMPruner().kept(11) == [30, 20, 11]
    for budget in range(1, 3000):
        assert SparseVLMPruner().kept(budget) == [budget * 300 // 110, budget * 200 // 110, budget]
        assert SparseVLMPruner(schedule=(2.7, 1.8, 0.9)).kept(budget) == [3 * budget, 2 * budget, budget]


def test_one_stage_is_the_top_of_that_layer():
    scores_LN = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    ctx = PruneContext((TokenGrid(5, 2, 2),), 6, {"verifier_attention_weighted": scores_LN})
    pruner = SparseVLMPruner(layers=(9,), schedule=(1.0,))
    assert torch.equal(pruner.select(ctx).index, KeepSet.top(scores_LN[4], 6).index)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="one share a layer"):
        SparseVLMPruner(layers=(1, 2))
    with pytest.raises(ValueError, match="none below the last"):
        SparseVLMPruner(schedule=(3.0, 0.5, 1.0))
    with pytest.raises(ValueError, match="above 0"):
        SparseVLMPruner(schedule=(3.0, 2.0, 0.0))
