"""PruneVid: static cells by a naive mean of pairs, means over scenes, attention of clusters."""

from itertools import combinations

import pytest
import torch
from rounding import assert_same_sums
from specvlm_prunevid import PruneVidPruner, attended, still
from torch.nn.functional import cosine_similarity

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def context(grid, budget, features, attention):
    return PruneContext((grid,), budget, {"features": features, "verifier_attention": attention})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"tau": -2.0, "scenes": 0.0}, {"tau": 2.0, "scenes": 1.0}], ids=str)
def test_contract(fields):
    check_pruner(PruneVidPruner, **fields)


def test_static_cells_are_those_of_high_mean_cosine_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    x_FPD = torch.randn(1, 30, 6, generator=generator) + 0.8 * torch.randn(7, 30, 6, generator=generator)
    scenes = [range(4), range(4, 6), range(6, 7)]
    mean_GPD, static_GP = still(x_FPD, torch.tensor([4, 2, 1]), 0.5)
    for scene, frames in enumerate(scenes):
        assert_same_sums(mean_GPD[scene], x_FPD[list(frames)].mean(0), len(frames) + 1, x_FPD)
        pairs = [cosine_similarity(x_FPD[a], x_FPD[b], dim=-1) for a, b in combinations(frames, 2)]
        expected = torch.stack(pairs).mean(0) > 0.5 if pairs else torch.zeros(30, dtype=torch.bool)
        assert torch.equal(static_GP[scene], expected)
    assert static_GP[:2].any() and not static_GP.all()


def test_a_still_scene_becomes_its_mean_and_a_new_scene_begins_where_all_changes():
    generator = torch.Generator().manual_seed(1)
    scenes = torch.randn(2, 1, 6, 16, generator=generator).expand(2, 4, 6, 16)
    x_FPD = (scenes + 0.05 * torch.randn(2, 4, 6, 16, generator=generator)).flatten(0, 1)
    keep = PruneVidPruner().select(context(TokenGrid(8, 2, 3), 12, x_FPD.flatten(0, 1), torch.rand(48, generator=generator)))
    assert keep.index.tolist() == [*range(6), *range(24, 30)]
    expected = torch.cat([x_FPD[:4].mean(0), x_FPD[4:].mean(0)])
    assert_same_sums(keep.pool @ x_FPD.flatten(0, 1), expected, 5, x_FPD)


def test_clusters_stay_by_the_highest_attention_among_their_tokens():
    owner_N = torch.tensor([0, 0, 2, 2, 4, 5])
    attention_N = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.5, 0.4])
    moving_N = torch.zeros(6, dtype=torch.bool)
    assert attended(owner_N, moving_N, attention_N, 2).tolist() == [0, 0, -1, -1, 4, -1]


def test_static_and_moving_clusters_keep_the_same_share():
    still_N = torch.tensor([True] * 4 + [False] * 4)
    kept = attended(torch.arange(8), still_N, torch.arange(8.0), 4)
    assert kept.tolist() == [-1, -1, 2, 3, -1, -1, 6, 7]


def test_the_budget_is_met():
    generator = torch.Generator().manual_seed(2)
    grid = TokenGrid(6, 4, 5)
    for budget in range(1, 120, 7):
        x_ND, attention = torch.randn(120, 8, generator=generator), torch.rand(120, generator=generator)
        assert len(PruneVidPruner(tau=2.0).select(context(grid, budget, x_ND, attention))) == budget
