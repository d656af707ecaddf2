"""METok: events, strides, pooled tokens, and the fit to a budget."""

import pytest
import torch
from rounding import assert_same_sums
from specvlm_metok import MeTokPruner, fitted
from torch.nn.functional import avg_pool2d

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"events": 1, "top_frames": 1}], ids=str)
def test_contract(fields):
    check_pruner(MeTokPruner, **fields)


def test_strides_follow_events_and_frames():
    events = [(0, 3), (3, 6), (6, 9)]
    relevance = [0.1, 0.2, 0.3, 0.9, 0.0, 0.8, 0.5, 0.4, 0.6]
    assert MeTokPruner(key_events=2, top_frames=1).levels(relevance, events) == [3, 3, 2, 1, 2, 2, 2, 2, 1]


def test_pooled_tokens_are_means_of_their_blocks():
    x_FPD = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    attention = torch.arange(32.0)
    ctx = PruneContext((TokenGrid(2, 4, 4),), 8, {"features": x_FPD.flatten(0, 1), "verifier_attention": attention})
    keep = MeTokPruner(events=1).select(ctx)
    expected = avg_pool2d(x_FPD.view(2, 4, 4, 3).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).reshape(8, 3)
    assert len(keep) == 8
    assert_same_sums(keep.pool @ x_FPD.flatten(0, 1), expected, 5, x_FPD)


def test_relevant_frames_are_the_finer_ones_and_the_least_relevant_are_dropped():
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 39) == [2, 2, 4, 8]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 40) == [2, 2, 4, 4]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 30) == [4, 2, 4, 4]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 2) == [8, 8, 0, 0]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 255) == [1, 1, 1, 2]


@pytest.mark.parametrize("budget", range(1, 200, 9))
def test_pooled_tokens_fit_the_budget_and_use_most_of_it(budget):
    strides = fitted([1, 2, 3, 2, 1], [0.3, 0.1, 0.5, 0.9, 0.2], 6, 7, budget)
    used = sum(-(-6 // s) * -(-7 // s) for s in strides if s)
    assert budget / 3 <= used <= budget


def test_events_begin_at_the_least_similar_frames():
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(3, 1, 4, 8, generator=generator).expand(3, 4, 4, 8) + 0.1 * torch.randn(3, 4, 4, 8, generator=generator)
    attention = torch.zeros(12, 4)
    attention[5] = 1.0
    ctx = PruneContext(
        (TokenGrid(12, 2, 2),), 24, {"features": scene.reshape(48, 8), "verifier_attention": attention.flatten()}
    )
    keep = MeTokPruner(events=3, key_events=1).select(ctx)
    counts = torch.bincount(keep.index // 4, minlength=12)
    assert counts.tolist() == [1] * 4 + [4] * 4 + [1] * 4
