"""Merged keep sets, and single-video pruners applied to several videos."""

from dataclasses import replace

import pytest
import torch

from specvlm.strategies import PruneContext, token_signals
from specvlm.types import KeepSet, TokenGrid


def test_merge_adds_up_entries_scales_rows_and_drops_negative_owners():
    owner, source = torch.tensor([4, 1, 1, 4, -1, 1]), torch.tensor([4, 0, 1, 2, 3, 0])
    keep = KeepSet.merge(owner, source, torch.tensor([1.0, 1.0, 2.0, 3.0, 9.0, 1.0]), 5)
    assert keep.index.tolist() == [1, 4]
    torch.testing.assert_close(keep.pool.to_dense(), torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0.75, 0, 0.25]]))


def test_an_owner_without_weight_keeps_its_own_feature():
    keep = KeepSet.merge(torch.tensor([2, 0]), torch.tensor([1, 1]), torch.tensor([0.0, 2.0]), 3)
    assert keep.pool.to_dense().tolist() == [[0, 1, 0], [0, 0, 1]]


GRIDS = (TokenGrid(2, 2, 3, newline=1), TokenGrid(1, 2, 2), TokenGrid(1, 1, 1, newline=1))


def context(budget):
    total = sum(map(len, GRIDS))
    per_layer = torch.arange(2.0)[:, None] * 100 + torch.arange(float(total))
    signals = {"features": torch.arange(2.0 * total).view(total, 2), "verifier_attention_per_layer": per_layer}
    return PruneContext(GRIDS, budget, signals)


def test_each_video_gets_its_cells_its_signals_and_its_share():
    seen = []

    def select(ctx):
        seen.append((ctx.grid, ctx.budget, ctx.features[0, 0].item() / 2, ctx.signal("verifier_attention_per_layer").shape))
        return KeepSet.uniform(ctx.total, ctx.budget)

    keep = context(10).each_video(select)
    assert seen == [(TokenGrid(2, 2, 3), 7, 0.0, (2, 12)), (TokenGrid(1, 2, 2), 2, 13.0, (2, 4))]
    assert keep.index.tolist() == [0, 1, 3, 5, 7, 9, 11, 13, 16, 17] and keep.pool is None


def test_newline_tokens_are_kept_last_and_nothing_is_asked_of_a_whole_video():
    def select(ctx):
        raise AssertionError("there is nothing to choose")

    assert PruneContext((TokenGrid(2, 1, 2, newline=1),), 5).each_video(select).index.tolist() == [0, 1, 2, 3, 4]
    assert PruneContext((TokenGrid(2, 1, 2, newline=1),), 4).each_video(select).index.tolist() == [0, 1, 2, 3]


def test_pools_of_videos_are_joined_with_plain_selections():
    def select(ctx):
        if ctx.total == 4:
            return KeepSet.uniform(4, ctx.budget)
        return KeepSet.merge(
            torch.zeros(ctx.total, dtype=torch.int64), torch.arange(ctx.total), torch.ones(ctx.total), ctx.total
        )

    keep = context(10).each_video(select)
    assert keep.index.tolist() == [0, 13, 16, 17]
    dense = keep.pool.to_dense()
    torch.testing.assert_close(dense[0, :12], torch.full((12,), 1 / 12))
    torch.testing.assert_close(dense[1:], torch.eye(len(dense[0]))[keep.index[1:]])


def test_signals_of_one_number_a_token_are_named():
    assert "verifier_attention" in token_signals()
    assert not {"features", "verifier_attention_per_layer", "verifier_attention_last_row"} & set(token_signals())


def test_scores_are_read_in_float32_and_nan_is_refused():
    ctx = PruneContext((TokenGrid(1, 1, 3),), 1, {"verifier_attention": torch.tensor([1.0, float("nan"), 2.0]).bfloat16()})
    with pytest.raises(ValueError, match="verifier_attention: 1 of 3 are NaN"):
        ctx.scores("verifier_attention")
    assert (
        replace(ctx, signals={"verifier_attention": torch.ones(3).bfloat16()}).scores("verifier_attention").dtype
        == torch.float32
    )
