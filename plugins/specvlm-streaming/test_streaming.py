"""Streaming: the exact budget, and the same tokens dropped as by a naive loop."""

import math
from itertools import pairwise

import pytest
import specvlm_streaming
import torch
from specvlm_streaming import StreamingPruner

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"chunk": 3}], ids=str)
def test_contract(fields):
    check_pruner(StreamingPruner, **fields)


def naive(x_ND, budget, step):
    """Chunk by chunk, comparing all neighbours in memory again."""
    memory, rows = [], x_ND.tolist()
    for start in range(0, len(rows), step):
        memory += range(start, min(start + step, len(rows)))
        similar = {a: cosine(rows[a], rows[b]) for a, b in pairwise(memory)}
        most = sorted(similar, key=lambda token: (-similar[token], -token))
        gone = set(most[: max(len(memory) - budget, 0)])
        memory = [token for token in memory if token not in gone]
    return memory


def cosine(x, y):
    product, size = sum(a * b for a, b in zip(x, y, strict=True)), math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return product / size


@pytest.mark.parametrize("kind", ["random", "slow", "static", "alternating", "one frame"])
@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_it_keeps_exactly_the_budget_and_what_a_naive_loop_keeps(chunk, kind):
    for seed, frames in enumerate((1, 1, 1) if kind == "one frame" else (7, 18, 35)):
        x_ND = torch.randn(6 * frames, 64, generator=torch.Generator().manual_seed(seed))
        x_ND = (x_ND.cumsum(0) if kind == "slow" else x_ND).sign()  # 64 numbers of 1 or -1: no cosine is rounded
        if kind in ("static", "alternating"):
            scene_F = torch.arange(frames) % (1 if kind == "static" else 2)
            x_ND = x_ND.view(frames, 6, 64)[scene_F].flatten(0, 1)
        for budget in {1, 2, 5, len(x_ND) // 10, len(x_ND) // 2, len(x_ND) - 1} - {0}:
            ctx = PruneContext((TokenGrid(frames, 2, 3),), budget, {"features": x_ND})
            index = StreamingPruner(chunk=chunk).select(ctx).index
            assert len(index) == budget
            assert index.tolist() == naive(x_ND, budget, 6 * chunk)


def test_a_chunk_is_one_pass(monkeypatch):
    passes = []
    monkeypatch.setattr(specvlm_streaming, "cosine", lambda a, b: passes.append(len(a)) or torch.zeros(len(a)))
    for pruner, expected in ((StreamingPruner(), 8), (StreamingPruner(chunk=1), 128)):
        passes.clear()
        pruner.select(PruneContext((TokenGrid(128, 2, 2),), 1, {"features": torch.ones(512, 2)}))
        assert len(passes) == 2 * expected  # new tokens, and tokens that lost their next one


def test_the_token_most_like_its_next_goes_first():
    angle = torch.tensor([0.0, 0.5, 0.6, 1.4, 1.41])
    x_ND = torch.stack([angle.cos(), angle.sin()], dim=1)
    kept = [StreamingPruner(chunk=5).select(PruneContext((TokenGrid(1, 1, 5),), b, {"features": x_ND})).index for b in (4, 3)]
    assert [k.tolist() for k in kept] == [[0, 1, 2, 4], [0, 2, 4]]


def test_of_equal_tokens_the_earlier_stay_but_for_the_newest():
    ctx = PruneContext((TokenGrid(1, 1, 6),), 3, {"features": torch.ones(6, 2)})
    assert StreamingPruner().select(ctx).index.tolist() == [0, 1, 5]
