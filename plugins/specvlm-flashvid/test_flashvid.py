"""FlashVID: a merged chain is a plain mean, picks equal a naive loop, the budget is met exactly."""

import pytest
import torch
from rounding import assert_same_sums
from specvlm_flashvid import FlashVidPruner, diverse
from torch.nn.functional import normalize

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def context(grid, budget, features, attention=None):
    attention = torch.ones(len(grid)) if attention is None else attention
    return PruneContext((grid,), budget, {"features": features, "verifier_attention": attention})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"alpha": 0.0}, {"alpha": 1.0, "merge": -1.0, "segments": 1}], ids=str)
def test_contract(fields):
    check_pruner(FlashVidPruner, **fields)


@pytest.mark.parametrize("length", [2, 3, 6])
def test_a_merged_chain_is_the_plain_mean_of_its_tokens(length):
    """The published code adds direct children alone and scales a chain of T by T / 2."""
    step = torch.arange(length)[:, None] * torch.tensor([[0.0, 0.0, 0.01]])
    still = torch.tensor([1.0, 0.0, 0.0]).expand(length, 3) + step
    x_FPD = torch.stack([still, torch.tensor([0.0, 1.0, 0.0]) + step], dim=1)
    pruner = FlashVidPruner(alpha=0.0, segments=1)
    keep = pruner.select(context(TokenGrid(length, 1, 2), 2, x_FPD.flatten(0, 1)))
    assert keep.index.tolist() == [0, 1]
    assert_same_sums(keep.pool @ x_FPD.flatten(0, 1), x_FPD.mean(0), length + 1, x_FPD)


def test_a_tree_with_branches_is_the_plain_mean_too():
    root, twig = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    x_ND = torch.stack([root, twig, root + 0.1 * twig, root - 0.1 * twig, root * 2, root * 3])
    keep = FlashVidPruner(alpha=0.0, segment=-1.0, segments=1).select(context(TokenGrid(3, 1, 2), 2, x_ND))
    assert keep.index.tolist() == [0, 1]
    torch.testing.assert_close(keep.pool.to_dense()[0], torch.tensor([0.2, 0, 0.2, 0.2, 0.2, 0.2]))


@pytest.mark.parametrize(("segment", "members"), [(0.9, [0, 1]), (0.8, [0, 1, 2, 3])])
def test_trees_end_at_a_cut(segment, members):
    """Frames 1 and 2 are alike enough to be linked (cosine 0.85). A budget of 1 leaves no weakest link to be cut for it."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.85, (1 - 0.85**2) ** 0.5]])
    pruner = FlashVidPruner(alpha=0.0, segments=1, segment=segment)
    keep = pruner.select(context(TokenGrid(4, 1, 1), 1, torch.cat([a, a, b, b])))
    assert keep.index.tolist() == [0] and keep.pool.coalesce().indices()[1].tolist() == members


def naive_diverse(unit_PD, saliency_P, picks):
    count = len(unit_PD)
    distance = [[float((1 - unit_PD[i] @ unit_PD[j]) * saliency_P[j]) for j in range(count)] for i in range(count)]
    picked = [max(range(count), key=lambda j: min(distance[i][j] for i in range(count) if i != j))]
    while len(picked) < picks:
        left = [j for j in range(count) if j not in picked]
        picked.append(max(left, key=lambda j: min(distance[i][j] for i in picked)))
    return sorted(picked)


def test_picks_equal_a_naive_greedy_loop():
    generator = torch.Generator().manual_seed(0)
    unit_FPD = normalize(torch.randn(3, 9, 5, generator=generator), dim=-1)
    saliency_FP = torch.rand(3, 9, generator=generator)
    for picks in range(1, 10):
        for frame, picked_P in enumerate(diverse(unit_FPD, saliency_FP, picks)):
            assert picked_P.nonzero().flatten().tolist() == naive_diverse(unit_FPD[frame], saliency_FP[frame], picks)


def test_the_budget_is_met_exactly():
    generator = torch.Generator().manual_seed(1)
    grid = TokenGrid(6, 3, 4)
    features, attention = torch.randn(len(grid), 8, generator=generator), torch.rand(len(grid), generator=generator)
    smooth = features.view(6, 12, 8).cumsum(0).flatten(0, 1)
    for budget in range(1, len(grid)):
        for x_ND in (features, smooth):
            assert len(FlashVidPruner().select(context(grid, budget, x_ND, attention))) == budget
