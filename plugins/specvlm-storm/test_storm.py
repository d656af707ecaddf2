"""STORM: pooled tokens are plain means, and strides leave out whole frames."""

import pytest
import torch
from rounding import assert_same_sums
from specvlm_storm import StormPruner

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"pool": 2, "spatial": 2}, {"pool": 99}], ids=str)
def test_contract(fields):
    check_pruner(StormPruner, **fields)


def test_pooled_tokens_are_the_mean_of_four_frames_cell_by_cell():
    x_FPD = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(0))
    keep = StormPruner().select(PruneContext((TokenGrid(8, 2, 3),), 12))
    assert keep.index.tolist() == [*range(6, 12), *range(30, 36)]  # frames 1 and 5 of 0..3 and 4..7
    assert_same_sums(keep.pool @ x_FPD.flatten(0, 1), x_FPD.unflatten(0, (2, 4)).mean(1).flatten(0, 1), 5, x_FPD)


def test_a_larger_budget_pools_fewer_frames():
    keep = StormPruner().select(PruneContext((TokenGrid(8, 2, 3),), 29))
    assert len(keep) == 24 and torch.equal(keep.pool.to_dense().count_nonzero(dim=1), torch.full((24,), 2))


def test_a_smaller_budget_strides_over_frames():
    keep = StormPruner(pool=2).select(PruneContext((TokenGrid(12, 2, 3),), 18))
    frames = keep.pool.coalesce().indices()[1] // 6
    assert len(keep) == 18 and frames.unique().tolist() == [1, 2, 5, 6, 9, 10]


def test_space_is_pooled_where_one_frame_is_too_large():
    x_FPD = torch.randn(4, 20, 5, generator=torch.Generator().manual_seed(0))
    keep = StormPruner().select(PruneContext((TokenGrid(4, 4, 5),), 7))
    first_block = x_FPD.view(4, 4, 5, 5)[:, :2, :2].flatten(0, 2).mean(0)
    assert len(keep) == 6
    assert_same_sums((keep.pool @ x_FPD.flatten(0, 1))[0], first_block, 17, x_FPD)
