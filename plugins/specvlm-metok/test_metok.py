"""METok: events, strides, pooled tokens, and the fit to a budget."""

import math
from itertools import pairwise

import pytest
import torch
from rounding import assert_same_sums
from specvlm_metok import MeTokPruner, fitted
from torch.nn.functional import avg_pool2d

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.toolkit.segments import adjacent_cosine, cuts, spans
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"events": 1, "top_frames": 1}], ids=str)
def test_contract(fields):
    check_pruner(MeTokPruner, **fields)


def test_strides_follow_events_and_frames():
    events = [(0, 3), (3, 6), (6, 9)]
    relevance = [0.1, 0.2, 0.3, 0.9, 0.0, 0.8, 0.5, 0.4, 0.6]
    assert MeTokPruner(key_events=2, top_frames=1).levels(relevance, events) == [3, 3, 2, 1, 2, 2, 2, 2, 1]


def naive_strides(means, relevance, events, keys, top):
    """The paper's stride of each frame."""
    alike = sorted((round(cosine(a, b), 5), f) for f, (a, b) in enumerate(pairwise(means)))
    event_of = [sum(1 for _, cut in alike[: events - 1] if cut < f) for f in range(len(means))]
    members = [[f for f in range(len(means)) if event_of[f] == e] for e in range(max(event_of) + 1)]
    ranked = sorted(range(len(members)), key=lambda e: (-max(relevance[f] for f in members[e]), e))
    strides = {}
    for place, e in enumerate(ranked):
        for nth, f in enumerate(sorted(members[e], key=lambda f: (-relevance[f], f))):
            strides[f] = (2 if nth < top else 4) * (1 if place < keys else 2)
    return [strides[f] for f in range(len(means))]


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


@pytest.mark.parametrize("kind", ["random", "ties", "static", "alternating", "one frame"])
def test_events_and_strides_equal_a_brute_force(kind):
    for seed in range(10):
        frames = 1 if kind == "one frame" else 9 + 4 * seed
        generator = torch.Generator().manual_seed(seed)
        scene_F = torch.arange(frames) % {"static": 1, "alternating": 2}.get(kind, frames)
        x_FD = torch.randn(frames, 16, generator=generator)[scene_F]
        relevance = torch.randint(2 if kind == "ties" else 999, (frames,), generator=generator).tolist()
        pruner = MeTokPruner()
        levels = pruner.levels(relevance, spans(cuts(adjacent_cosine(x_FD), least=pruner.events)))
        assert [2**level for level in levels] == naive_strides(x_FD.tolist(), relevance, 5, 3, 6)


@pytest.mark.parametrize("budget", [4, 9, 21, 50])
def test_a_whole_selection_is_what_its_strides_say(budget):
    """Every pooled token is the mean of a block of one frame, and a frame has all its blocks or none."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x_ND, attention = torch.randn(7 * 15, 4, generator=generator), torch.rand(7 * 15, generator=generator)
        ctx = PruneContext((TokenGrid(7, 3, 5),), budget, {"features": x_ND, "verifier_attention": attention})
        keep = MeTokPruner(events=3, key_events=1, top_frames=1).select(ctx)
        relevance = attention.view(7, 15).double().sum(1).tolist()
        events = spans(cuts(adjacent_cosine(x_ND.view(7, 15, 4).mean(1)), least=3))
        levels = MeTokPruner(events=3, key_events=1, top_frames=1).levels(relevance, events)
        expected = {}
        for f, side in enumerate(fitted(levels, relevance, 3, 5, budget)):
            for row in range(0, 3, side or 3):
                for column in range(0, 5, side or 5):
                    rows, columns = range(row, min(row + side, 3)), range(column, min(column + side, 5))
                    if side:
                        owner = f * 15 + (rows[0] + rows[-1]) // 2 * 5 + (columns[0] + columns[-1]) // 2
                        expected[owner] = [f * 15 + 5 * r + c for r in rows for c in columns]
        assert keep.index.tolist() == sorted(expected)
        for weights, owner in zip(keep.pool.to_dense(), keep.index.tolist(), strict=True):
            assert weights.nonzero().flatten().tolist() == expected[owner]
            assert_same_sums(weights[expected[owner]], torch.full((len(expected[owner]),), 1 / len(expected[owner])), 2)


def test_pooled_tokens_are_means_of_their_blocks():
    x_FPD = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    attention = torch.arange(32.0)
    ctx = PruneContext((TokenGrid(2, 4, 4),), 8, {"features": x_FPD.flatten(0, 1), "verifier_attention": attention})
    keep = MeTokPruner(events=1).select(ctx)
    expected = avg_pool2d(x_FPD.view(2, 4, 4, 3).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).reshape(8, 3)
    assert len(keep) == 8
    assert_same_sums(keep.pool @ x_FPD.flatten(0, 1), expected, 5, x_FPD)


def test_relevant_frames_are_the_finer_ones_and_the_least_relevant_are_dropped():
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 39) == [2, 2, 4, 8]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 40) == [2, 2, 4, 4]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 30) == [4, 2, 4, 4]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 2) == [8, 8, 0, 0]
    assert fitted([1, 1, 2, 3], [0.0, 1.0, 0.5, 0.2], 8, 8, 255) == [1, 1, 1, 2]


@pytest.mark.parametrize("budget", range(1, 200, 9))
def test_pooled_tokens_fit_the_budget_and_use_most_of_it(budget):
    strides = fitted([1, 2, 3, 2, 1], [0.3, 0.1, 0.5, 0.9, 0.2], 6, 7, budget)
    used = sum(-(-6 // s) * -(-7 // s) for s in strides if s)
    assert budget / 3 <= used <= budget


def test_events_begin_at_the_least_similar_frames():
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(3, 1, 4, 8, generator=generator).expand(3, 4, 4, 8) + 0.1 * torch.randn(3, 4, 4, 8, generator=generator)
    attention = torch.zeros(12, 4)
    attention[5] = 1.0
    ctx = PruneContext(
        (TokenGrid(12, 2, 2),), 24, {"features": scene.reshape(48, 8), "verifier_attention": attention.flatten()}
    )
    keep = MeTokPruner(events=3, key_events=1).select(ctx)
    counts = torch.bincount(keep.index // 4, minlength=12)
    assert counts.tolist() == [1] * 4 + [4] * 4 + [1] * 4
