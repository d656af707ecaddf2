"""What each simple pruner keeps, on cases small enough to check by eye."""

import pytest
import torch

from specvlm.strategies import PruneContext
from specvlm.strategies.pruners import (
    FastVPruner,
    NonePruner,
    RandomPruner,
    UniformPruner,
    VerifierAttentionPruner,
    WindowPruner,
)
from specvlm.types import TokenGrid

GRIDS = (TokenGrid(2, 1, 3), TokenGrid(1, 1, 3, newline=1))


def context(budget, seed=0, **signals):
    return PruneContext(GRIDS, budget, signals, torch.Generator().manual_seed(seed))


def test_none_keeps_everything_and_tells_the_loop_to_ignore_the_ratio():
    assert NonePruner.keeps_all
    assert not UniformPruner.keeps_all
    assert NonePruner().select(context(3)).index.tolist() == list(range(10))


def test_uniform_steps_over_all_videos_from_the_first_token_to_the_last():
    assert UniformPruner().select(context(4)).index.tolist() == [0, 3, 6, 9]
    assert UniformPruner().select(context(1)).index.tolist() == [0]
    assert UniformPruner().select(context(9)).index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]


@pytest.mark.parametrize(("where", "kept"), [("front", [0, 1, 2]), ("middle", [3, 4, 5]), ("back", [7, 8, 9])])
def test_window_keeps_one_block(where, kept):
    assert WindowPruner(where).select(context(3)).index.tolist() == kept


def test_window_names_the_allowed_places():
    with pytest.raises(ValueError, match=r"front or middle or back, got 'midle'\. Did you mean .middle"):
        WindowPruner("midle")


def test_random_depends_on_the_seed_alone():
    def kept(seed):
        return RandomPruner().select(context(5, seed)).index.tolist()

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(20)}) > 10


def test_random_reaches_every_token_equally_often():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[RandomPruner().select(PruneContext(GRIDS, 3, {}, generator)).index] += 1
    assert (counts - 600).abs().max() < 100  # five standard deviations are 102


def test_random_refuses_to_draw_without_a_generator():
    with pytest.raises(ValueError, match="generator"):
        RandomPruner().select(PruneContext(GRIDS, 3))


def test_verifier_attention_keeps_the_most_attended_and_the_earlier_of_equals():
    scores = torch.tensor([0.0, 5, 1, 1, 9, 0, 1, 0, 0, 7])
    assert VerifierAttentionPruner().select(context(4, verifier_attention=scores)).index.tolist() == [1, 2, 4, 9]


@pytest.mark.parametrize("pruner", [VerifierAttentionPruner(), FastVPruner(1)])
def test_nan_is_refused_in_a_sentence(pruner):
    nan = torch.tensor([0.0] * 9 + [torch.nan])
    with pytest.raises(ValueError, match="cannot rank 10 video tokens: 1 of their scores are NaN"):
        pruner.select(context(4, verifier_attention=nan, verifier_attention_last_row=nan[None]))


def test_fastv_reads_layer_k_counted_from_one():
    rows = torch.eye(10)
    assert FastVPruner().select(context(1, verifier_attention_last_row=rows)).index.tolist() == [1]
    assert FastVPruner(10).select(context(1, verifier_attention_last_row=rows)).index.tolist() == [9]
    assert FastVPruner(3, "draft").select(context(1, draft_attention_last_row=rows[:3])).index.tolist() == [2]


def test_fastv_asks_the_source_it_is_given_and_stops_the_drafter_there():
    assert (FastVPruner().needs, FastVPruner().draft_layers) == ({"verifier_attention_last_row"}, 0)
    draft = FastVPruner(layer=5, source="draft")
    assert (draft.needs, draft.draft_layers) == ({"draft_attention_last_row"}, 5)


def test_fastv_refuses_layers_and_sources_that_are_not_there():
    with pytest.raises(ValueError, match="counts from 1, got 0"):
        FastVPruner(0)
    with pytest.raises(ValueError, match="target or draft, got 'drafter'"):
        FastVPruner(source="drafter")
    with pytest.raises(ValueError, match="layer=30, but the target has 28 layers"):
        FastVPruner(30).select(context(4, verifier_attention_last_row=torch.rand(28, 10)))
