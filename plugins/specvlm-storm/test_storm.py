"""STORM: the result equals plain loops; pooled tokens are plain means, and strides skip whole frames."""

import naive
import pytest
import torch
from rounding import assert_same_sums
from specvlm_storm import StormPruner

from specvlm.strategies import PruneContext
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


def brute_force(frames, height, width, budget, pool, side):
    while -(-height // side) * -(-width // side) > budget:
        side *= 2
    blocks = {}  # the cells of each block
    for row in range(height):
        for column in range(width):
            blocks.setdefault((row // side, column // side), []).append(row * width + column)
    groups, rows = min(frames, budget // len(blocks)), {}
    for group in range(groups):
        first, last = frames * group // groups, frames * (group + 1) // groups
        first += max(last - first - pool, 0) // 2
        last = min(last, first + pool)
        for cells in blocks.values():
            across, down = sorted({cell % width for cell in cells}), sorted({cell // width for cell in cells})
            middle = down[(len(down) - 1) // 2] * width + across[(len(across) - 1) // 2]
            sources = [frame * height * width + cell for frame in range(first, last) for cell in cells]
            rows[(first + last - 1) // 2 * height * width + middle] = dict.fromkeys(sources, 1.0)
    return naive.mean_pool(rows, frames * height * width)


@pytest.mark.slow
def test_it_equals_plain_loops_after_the_papers_description():
    for case in range(50):
        frames, height, width, pool, side = 1 + case % 9, 1 + case % 4, 1 + case % 5, 1 + case % 6, 1 + case % 2
        total = frames * height * width
        for budget in {1, total // 3, total // 2, total - 1} - {0, total}:
            keep = StormPruner(pool, side).select(PruneContext((TokenGrid(frames, height, width),), budget))
            index, pool_KN = brute_force(frames, height, width, budget, pool, side)
            assert keep.index.tolist() == index
            assert_same_sums(keep.pool.to_dense(), pool_KN, 1, 1.0)
