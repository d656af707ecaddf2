"""Streaming: exactly the budget, and what a naive loop forgets."""

from itertools import pairwise

import pytest
import torch
from specvlm_streaming import StreamingPruner
from torch.nn.functional import cosine_similarity

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"chunk": 3}], ids=str)
def test_contract(fields):
    check_pruner(StreamingPruner, **fields)


def naive(x_ND, budget, step):
    memory = []
    for start in range(0, len(x_ND), step):
        memory += range(start, min(start + step, len(x_ND)))
        similar = {a: float(cosine_similarity(x_ND[a], x_ND[b], dim=0)) for a, b in pairwise(memory)}
        most = sorted(similar, key=lambda token: (-similar[token], -token))
        gone = set(most[: max(len(memory) - budget, 0)])
        memory = [token for token in memory if token not in gone]
    return memory


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_it_keeps_exactly_the_budget_and_what_a_naive_loop_keeps(chunk):
    x_ND = torch.randn(63, 6, generator=torch.Generator().manual_seed(0)).cumsum(0)
    for budget in range(1, 63, 5):
        ctx = PruneContext((TokenGrid(7, 3, 3),), budget, {"features": x_ND})
        index = StreamingPruner(chunk=chunk).select(ctx).index
        assert len(index) == budget
        assert index.tolist() == naive(x_ND, budget, 9 * chunk)


def test_the_token_most_like_its_next_goes_first():
    angle = torch.tensor([0.0, 0.5, 0.6, 1.4, 1.41])
    x_ND = torch.stack([angle.cos(), angle.sin()], dim=1)
    kept = [StreamingPruner(chunk=5).select(PruneContext((TokenGrid(1, 1, 5),), b, {"features": x_ND})).index for b in (4, 3)]
    assert [k.tolist() for k in kept] == [[0, 1, 2, 4], [0, 2, 4]]


def test_of_equal_tokens_the_earlier_stay_but_for_the_newest():
    ctx = PruneContext((TokenGrid(1, 1, 6),), 3, {"features": torch.ones(6, 2)})
    assert StreamingPruner().select(ctx).index.tolist() == [0, 1, 5]
