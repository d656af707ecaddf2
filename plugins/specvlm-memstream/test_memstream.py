"""MemStream: a linear drift changes nothing, ranks equal scipy's, frames are taken whole."""

import pytest
import torch
from rounding import assert_same_sums
from scipy.stats import rankdata
from specvlm_memstream import MemStreamPruner, detrended, ranks

from specvlm.errors import UserError
from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid

GRID = TokenGrid(10, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"experts": ("features",), "unit": "frame"}, {"detrend": False}], ids=str)
def test_contract(fields):
    check_pruner(MemStreamPruner, **fields)


def select(attention, budget=12, **fields):
    ctx = PruneContext((GRID,), budget, {"verifier_attention": attention})
    return MemStreamPruner(experts=("verifier_attention",), **fields).select(ctx).index.tolist()


def test_a_linear_drift_changes_nothing():
    attention = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drift = torch.arange(10).repeat_interleave(6)
    for slope in (0.5, 7.0, -2.0):
        assert select(attention + slope * drift) == select(attention)
    assert select(attention + 7 * drift, detrend=False) == list(range(48, 60))


def test_the_line_is_the_least_squares_one():
    scores = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    time = torch.stack([torch.arange(9.0).double(), torch.ones(9).double()], dim=1)
    slope = torch.linalg.lstsq(time, scores.mean(2).T).solution[0]
    line = slope[:, None] * (time[:, 0] - 4)
    assert_same_sums(detrended(scores), scores - line[:, :, None], terms=2 * 9 * 4, size=9.0)


def test_ranks_equal_those_of_scipy_with_ties_shared():
    score = torch.randint(0, 8, (50,), generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(ranks(score), torch.from_numpy((rankdata(score) - 1) / 49))


def test_the_score_is_the_mean_over_experts():
    generator = torch.Generator().manual_seed(3)
    rows, last = torch.rand(60, generator=generator), torch.rand(4, 60, generator=generator)
    ctx = PruneContext((GRID,), 9, {"verifier_attention": rows, "verifier_attention_last_row": last})
    keep = MemStreamPruner(experts=("verifier_attention", "verifier_attention_last_row"), detrend=False).select(ctx)
    mean = rankdata(rows) + rankdata(last.double().mean(0))
    assert set(keep.index.tolist()) == set(sorted(range(60), key=lambda i: -mean[i])[:9])


def test_frames_are_taken_whole():
    index = select(torch.rand(60, generator=torch.Generator().manual_seed(4)), budget=12, unit="frame")
    assert len({i // 6 for i in index}) == 2


def test_other_experts_are_refused_with_a_suggestion():
    with pytest.raises(UserError, match='Did you mean "features"'):
        MemStreamPruner(experts=("feature",))
    with pytest.raises(UserError, match="got none"):
        MemStreamPruner(experts=())
