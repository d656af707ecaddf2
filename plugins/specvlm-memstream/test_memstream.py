"""MemStream: the result equals plain loops; the default fuses by reciprocal ranks; our own variants are options."""

import naive
import pytest
import torch
from rounding import assert_same_sums
from scipy.stats import rankdata
from specvlm_memstream import MemStreamPruner, detrended, places, ranks

from specvlm.errors import UserError
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid

GRID = TokenGrid(10, 2, 3)
OURS = MemStreamPruner(
    experts=("verifier_attention", "verifier_attention_last_row", "features"),
    change=-1.0,
    fusion="mean",
    detrend=True,
    unit="token",
)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", [MemStreamPruner(), OURS, MemStreamPruner(experts=("features",), detrend=True)], ids=str)
def test_contract(pruner):
    check_pruner(pruner)


def select(attention, budget=12, unit="token", **fields):
    ctx = PruneContext((GRID,), budget, {"verifier_attention": attention})
    pruner = MemStreamPruner(experts=("verifier_attention",), change=-1.0, unit=unit, **fields)
    return pruner.select(ctx).index.tolist()


@pytest.mark.parametrize("fusion", ["reciprocal", "mean"])
def test_a_linear_drift_changes_nothing_where_it_is_taken_out(fusion):
    attention = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drift = torch.arange(10).repeat_interleave(6)
    for slope in (0.5, 7.0, -2.0):
        assert select(attention + slope * drift, fusion=fusion, detrend=True) == select(attention, fusion=fusion, detrend=True)
    assert select(attention + 7 * drift, fusion=fusion) == list(range(48, 60))


def test_the_line_is_the_least_squares_one():
    scores = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    time = torch.stack([torch.arange(9.0).double(), torch.ones(9).double()], dim=1)
    slope = torch.linalg.lstsq(time, scores.mean(2).T).solution[0]
    line = slope[:, None] * (time[:, 0] - 4)
    assert_same_sums(detrended(scores), scores - line[:, :, None], terms=2 * 9 * 4, size=9.0)


def test_ranks_equal_those_of_scipy_with_ties_shared():
    score = torch.randint(0, 8, (50,), generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(ranks(score), torch.from_numpy((rankdata(score) - 1) / 49))


def test_fusion_mean_is_the_mean_of_ranks_over_experts():
    generator = torch.Generator().manual_seed(3)
    rows, last = torch.rand(60, generator=generator), torch.rand(4, 60, generator=generator)
    ctx = PruneContext((GRID,), 9, {"verifier_attention": rows, "verifier_attention_last_row": last})
    experts = ("verifier_attention", "verifier_attention_last_row")
    keep = MemStreamPruner(experts=experts, change=-1.0, fusion="mean", unit="token").select(ctx)
    mean = rankdata(rows) + rankdata(last.double().mean(0))
    assert set(keep.index.tolist()) == set(sorted(range(60), key=lambda i: -mean[i])[:9])


def test_equal_scores_share_the_better_place():
    assert places(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [1, 4, 1, 3]


def test_a_frame_that_both_retrievals_rank_well_comes_before_each_ones_first():
    """Ranks 2 and 2 give 2 / 62, more than the 1 / 61 + 1 / 64 of ranks 1 and 4."""
    attention, similarity = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    signals = {"verifier_attention": attention, "text_similarity": torch.stack([similarity, torch.zeros(4)])}
    pruner = MemStreamPruner(change=-1.0)
    order = [pruner.select(PruneContext((TokenGrid(4, 1, 1),), b, signals)).index.tolist() for b in (1, 2, 3)]
    assert order == [[1], [0, 1], [0, 1, 3]]


def test_of_a_frame_only_what_changed_is_shown_while_there_is_more_of_it():
    """Cell 0 is static and kept only in the first frame; cell 1 is reversed in every frame and kept in each."""
    x_FPD = torch.ones(3, 2, 2)
    x_FPD[1, 1] = -1
    signals = {"features": x_FPD.flatten(0, 1), "verifier_attention": torch.arange(6.0), "text_similarity": torch.zeros(2, 6)}
    kept = [MemStreamPruner().select(PruneContext((TokenGrid(3, 1, 2),), b, signals)).index.tolist() for b in range(1, 6)]
    assert kept == [[5], [3, 5], [0, 3, 5], [0, 1, 3, 5], [0, 1, 3, 4, 5]]


def brute_force(x_FPD, attention, similarity, budget, change=0.1, c=60):
    frames, per_frame, _ = x_FPD.shape
    keys = set(range(per_frame))
    for frame in range(1, frames):
        for cell in range(per_frame):
            if 1 - naive.cosine(x_FPD[frame, cell], x_FPD[frame - 1, cell]) > change:
                keys.add(frame * per_frame + cell)
    score = [0.0] * frames
    for expert in (attention, similarity):
        mean = [sum(expert[f * per_frame : (f + 1) * per_frame].tolist()) / per_frame for f in range(frames)]
        for frame in range(frames):
            score[frame] += 1 / (c + 1 + sum(other > mean[frame] for other in mean))
    order = sorted(range(frames * per_frame), key=lambda i: (i not in keys, -score[i // per_frame], i))
    return sorted(order[:budget])


def test_it_equals_plain_loops_after_the_papers_description():
    for kind, x_FPD, attention, budget in naive.videos():
        similarity = attention.flip(0) if kind == "ties" else attention.cos() * torch.arange(len(attention)).sin()
        signals = {
            "features": x_FPD.flatten(0, 1),
            "verifier_attention": attention,
            "text_similarity": torch.stack([similarity, attention]),
        }
        keep = MemStreamPruner().select(PruneContext((TokenGrid(len(x_FPD), 4, 4),), budget, signals))
        assert keep.index.tolist() == brute_force(x_FPD, attention, similarity, budget), kind


def test_frames_are_taken_whole():
    index = select(torch.rand(60, generator=torch.Generator().manual_seed(4)), budget=12, unit="frame")
    assert len({i // 6 for i in index}) == 2


def test_other_experts_are_refused_with_a_suggestion():
    with pytest.raises(UserError, match='Did you mean "features"'):
        MemStreamPruner(experts=("feature",))
    with pytest.raises(UserError, match="got none"):
        MemStreamPruner(experts=())


def test_a_token_that_changed_by_just_the_threshold_is_no_key():
    x_ND = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1]])  # of cosine 0.5, exact in float32
    context = PruneContext((TokenGrid(2, 1, 1),), 1, {"features": x_ND})
    assert [MemStreamPruner(change=change).keys(context).tolist() for change in (0.5, 0.49)] == [[True, False], [True, True]]
