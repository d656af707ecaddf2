"""DyCoke: the result equals plain loops; groups of four, raster order, the last group, budgets below the anchors."""

import naive
import pytest
import torch
from specvlm_dycoke import DyCokePruner
from torch.nn.functional import cosine_similarity

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def kept(frames, height, width, budget, seed=0):
    grid = TokenGrid(frames, height, width)
    x_ND = torch.randn(len(grid), 8, generator=torch.Generator().manual_seed(seed))
    return DyCokePruner().select(PruneContext((grid,), budget, {"features": x_ND})).index, x_ND


@pytest.mark.slow
def test_contract():
    check_pruner(DyCokePruner)


@pytest.mark.parametrize("frames", [4, 8, 6, 7, 5])
def test_kept_cells_equal_a_naive_loop_in_raster_order(frames):
    """Also in a last group of two or three frames."""
    anchors, rest = -(-frames // 4), frames - -(-frames // 4)
    index, x_ND = kept(frames, 2, 5, 10 * anchors + 3 * rest)
    expected = []
    for frame in range(frames):
        reference = {0: frame, 1: frame - 1, 2: frame - 2, 3: frame - 1}[frame % 4]
        similar = [float(cosine_similarity(x_ND[frame * 10 + i], x_ND[reference * 10 + i], dim=0)) for i in range(10)]
        count = 10 if frame % 4 == 0 else 3
        expected += sorted(frame * 10 + i for i in sorted(range(10), key=lambda i: similar[i])[:count])
    assert index.tolist() == expected == sorted(expected)


def test_the_papers_share_leaves_47_and_a_half_per_cent():
    index, _ = kept(8, 4, 5, 76)
    assert torch.bincount(index // 20, minlength=8).tolist() == [20, 6, 6, 6, 20, 6, 6, 6]


def test_a_budget_below_the_anchors_is_spent_on_them_alone():
    index, _ = kept(32, 2, 5, 70)
    assert torch.bincount(index // 10, minlength=32).nonzero().flatten().tolist() == list(range(0, 32, 4))
    assert torch.bincount(index // 10, minlength=32)[[0, 16]].tolist() == [10, 10]


@pytest.mark.parametrize("budget", range(1, 40))
def test_the_budget_is_met_exactly(budget):
    assert len(kept(10, 2, 2, budget)[0]) == budget


def brute_force(x_FPD, frames, budget):
    per_frame = x_FPD.shape[1]
    anchors = frames[::4]
    if len(frames) == 1:
        return [frames[0] * per_frame + (2 * i + 1) * per_frame // (2 * budget) for i in range(min(budget, per_frame))]
    if budget < len(anchors) * per_frame:
        return brute_force(x_FPD, anchors, budget)
    found = [frame * per_frame + cell for frame in anchors for cell in range(per_frame)]
    rest = [place for place in range(len(frames)) if place % 4]
    count = naive.shares(budget - len(found), [per_frame] * len(rest))
    for place, most in zip(rest, count, strict=True):
        x_PD, reference_PD = x_FPD[frames[place]], x_FPD[frames[place - {1: 1, 2: 2, 3: 1}[place % 4]]]
        alike = [round(naive.cosine(x_PD[cell], reference_PD[cell]), 6) for cell in range(per_frame)]
        order = sorted(range(per_frame), key=lambda cell: (alike[cell], cell))
        found += [frames[place] * per_frame + cell for cell in order[:most]]
    return sorted(found)


@pytest.mark.slow
def test_it_equals_plain_loops_after_the_papers_description():
    for kind, x_FPD, _, budget in naive.videos():
        ctx = PruneContext((TokenGrid(len(x_FPD), 4, 4),), budget, {"features": x_FPD.flatten(0, 1)})
        assert DyCokePruner().select(ctx).index.tolist() == brute_force(x_FPD, list(range(len(x_FPD))), budget), kind
