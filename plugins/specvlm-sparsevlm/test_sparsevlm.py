"""The contract, the raters token by token, and the stages one after the other."""

import math

import pytest
import torch
from specvlm_sparsevlm import SparseVLMPruner

from specvlm.strategy import PruneContext
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


def test_a_later_stage_chooses_among_what_an_earlier_one_kept():
    scores_LN = torch.zeros(16, 12)
    scores_LN[2] = torch.arange(12.0)  # keeps int(3 * 300 / 110) = 8: tokens 4..11
    scores_LN[6] = -torch.arange(12.0)  # keeps 5: tokens 4..8
    scores_LN[15] = torch.tensor([9.0] * 4 + [0, 1, 0, 3, 2] + [9.0] * 3)
    ctx = PruneContext((TokenGrid(3, 2, 2),), 3, {"verifier_attention_weighted": scores_LN})
    assert SparseVLMPruner().select(ctx).index.tolist() == [5, 7, 8]


def test_one_stage_is_the_top_of_that_layer():
    scores_LN = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    ctx = PruneContext((TokenGrid(5, 2, 2),), 6, {"verifier_attention_weighted": scores_LN})
    pruner = SparseVLMPruner(layers=(9,), schedule=(1.0,))
    assert torch.equal(pruner.select(ctx).index, KeepSet.top(scores_LN[4], 6).index)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="one share a layer"):
        SparseVLMPruner(layers=(1, 2))
    with pytest.raises(ValueError, match="none below 1"):
        SparseVLMPruner(schedule=(3.0, 0.5, 1.0))
    with pytest.raises(ValueError, match="the last one 1"):
        SparseVLMPruner(schedule=(3.0, 2.0, 2.0))
