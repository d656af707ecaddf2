"""OneClip: peaks, boundaries at the interior minima, whole frames of the best clips."""

import random

import pytest
import torch
from specvlm_oneclip import OneClipPruner, boundary, lowest, peaks

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.parametrize("fields", [{}, {"clip": 1}, {"clip": 2, "clips": 1}], ids=str)
def test_contract(fields):
    check_pruner(OneClipPruner, **fields)


def test_boundaries_are_the_interior_minima():
    draw = random.Random(0)
    for _ in range(200):
        relevance = [draw.random() for _ in range(40)]
        starts, centres = OneClipPruner(clip=8).chunks(relevance)
        assert len(starts) == len(centres) == 5 and starts[0] == 0
        for start, left, right in zip(starts[1:], centres[:-1], centres[1:], strict=True):
            between = relevance[left + 1 : right]
            assert relevance[start] == min(between) and left < start < right


def test_of_equal_minima_the_earlier_is_the_boundary():
    assert boundary([3.0, 1.0, 2.0, 1.0, 3.0], 0, 4) == 1


def test_a_peak_is_as_high_as_it_stands_above_the_valleys_beside_it():
    assert peaks([0.0, 3.0, 1.0, 2.0, 0.5]) == {1: 2 * 3 - 0 - 1, 3: 2 * 2 - 1 - 0.5}
    assert peaks([1.0, 1.0, 1.0]) == {0: 0.0}
    assert peaks([1.0, 2.0, 2.0, 1.0]) == {1: 2.0}
    assert lowest([3.0, 2.0, 2.0, 1.0, 5.0, 0.0]) == 1.0


def test_frames_are_those_round_the_peaks():
    relevance = [0.0, 0.2, 9.0, 0.1, 0.0, 0.1, 5.0, 0.2, 0.0, 0.1, 0.3, 0.1]
    attention = torch.tensor(relevance).repeat_interleave(4)
    ctx = PruneContext((TokenGrid(12, 2, 2),), 10, {"verifier_attention": attention})
    index = OneClipPruner(clip=4).select(ctx).index
    assert torch.bincount(index // 4, minlength=12).nonzero().flatten().tolist() == [2, 6, 10]
    assert (index // 4 == 10).sum() == 2  # the rest of the budget, thinned out


def test_frames_of_a_clip_lie_at_even_distances():
    assert OneClipPruner(clip=100).frames([1.0, 2.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3) == {1, 4, 7}


@pytest.mark.parametrize("count", range(1, 30))
def test_the_number_of_frames_is_exact(count):
    draw = random.Random(count)
    assert len(OneClipPruner(clip=4, clips=2).frames([draw.random() for _ in range(30)], count)) == count


def test_nan_is_refused():
    ctx = PruneContext((TokenGrid(2, 1, 1),), 1, {"verifier_attention": torch.tensor([0.1, float("nan")])})
    with pytest.raises(ValueError, match="NaN"):
        OneClipPruner().select(ctx)
