"""FastVID: what anchors weigh, where anchor frames lie, and an exact budget."""

import pytest
import torch
from rounding import assert_same_sums
from specvlm_fastvid import FastVidPruner

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def context(grid, budget, features, attention):
    return PruneContext((grid,), budget, {"features": features, "verifier_attention": attention})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"d": 1.0, "segments": 1, "beta": 0.0}, {"d": 0.0}], ids=str)
def test_contract(fields):
    check_pruner(FastVidPruner, **fields)


@pytest.mark.parametrize(("start", "stop", "frames"), [(0, 9, [0, 4, 8]), (3, 6, [5]), (2, 7, [2, 6]), (5, 6, [5])])
def test_anchor_frames_are_every_fourth_counted_back_from_the_last(start, stop, frames):
    assert FastVidPruner().anchors(start, stop, 5, 99) == (frames, 5 * (stop - start) // len(frames))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.6, 1.0])
def test_an_anchor_weighs_as_in_the_paper_and_the_rest_is_a_mean(beta):
    generator = torch.Generator().manual_seed(0)
    grid, x_ND = TokenGrid(4, 2, 3), torch.randn(24, 4, generator=generator)
    pruner = FastVidPruner(segments=1, segment=-1.0, d=1.0, beta=beta)
    keep = pruner.select(context(grid, 4, x_ND, torch.rand(24, generator=generator)))
    assert len(keep) == 4 and keep.index.min() >= 18  # all four are anchors, of the last frame
    unit_ND = x_ND / x_ND.norm(dim=1, keepdim=True)
    rest = [i for i in range(24) if i not in keep.index.tolist()]
    nearest = {i: max(keep.index.tolist(), key=lambda a: float(unit_ND[i] @ unit_ND[a])) for i in rest}
    for anchor, row_D in zip(keep.index.tolist(), keep.pool @ x_ND, strict=True):
        mine = [i for i in rest if nearest[i] == anchor]
        w = max(1 / (len(mine) + 1), beta)
        expected = w * x_ND[anchor] + ((1 - w) * x_ND[mine].mean(0) if mine else 0)
        assert_same_sums(row_D, expected if mine else x_ND[anchor], len(mine) + 3, x_ND)


def test_salient_tokens_stay_as_they_are_and_gather_nothing():
    generator = torch.Generator().manual_seed(1)
    grid, x_ND, attention = TokenGrid(4, 3, 4), torch.randn(48, 6, generator=generator), torch.rand(48, generator=generator)
    keep = FastVidPruner().select(context(grid, 20, x_ND, attention))
    salient = attention.view(4, 12).topk(3, dim=1).indices + 12 * torch.arange(4)[:, None]
    rows = torch.searchsorted(keep.index, salient.flatten())
    assert torch.equal(keep.index[rows], salient.flatten())
    assert torch.equal(keep.pool.to_dense()[rows], torch.eye(48)[salient.flatten()])
    others = [row for row in range(48) if row in keep.index and row not in salient]
    assert keep.pool.to_dense()[:, salient.flatten()].sum() == 12 and others


@pytest.mark.slow
def test_the_budget_is_met_exactly():
    generator = torch.Generator().manual_seed(2)
    grid = TokenGrid(9, 3, 4)
    for budget in range(1, len(grid)):
        x_ND, attention = torch.randn(len(grid), 8, generator=generator), torch.rand(len(grid), generator=generator)
        assert len(FastVidPruner().select(context(grid, budget, x_ND, attention))) == budget
