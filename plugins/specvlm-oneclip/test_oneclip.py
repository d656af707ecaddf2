"""OneClip: clips as the released code cuts them, and frames of the best, equal brute force; and our own variants."""

import math
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from specvlm_oneclip import OneClipPruner, boundary, is_peak, lowest

from specvlm.errors import UserError
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid

OURS = {"centres": "peaks", "shares": "length"}


@pytest.mark.parametrize("fields", [{}, {"clip": 1}, {"clip": 2, "clips": 1}, OURS], ids=str)
def test_contract(fields):
    check_pruner(OneClipPruner, **fields)


def curves():
    """50 curves of integers, so that ties are exact: random, with plateaus, static, alternating, of one frame."""
    draw = random.Random(0)
    for number in range(40):
        yield [draw.randint(0, (3, 9, 1000)[number % 3]) for _ in range(draw.choice((2, 3, 7, 20, 33)))]
    yield from ([5] * 17, [5], [0, 9] * 8, [0, 9, 9] * 5, list(range(12)), list(range(12, 0, -1)))
    yield from ([0] * 6 + [1] * 6, [4, 3, 3, 3, 4], [9, 0, 0, 9, 0, 0, 9], [0, 7, 0])


def released_clips(s, k):
    """The clips of the released code, by its sums over differences instead of a minimum."""
    heights = []
    for i, value in enumerate(s):
        ends = []
        for step in (-1, 1):
            low, at = value, i + step
            while 0 <= at < len(s) and s[at] <= low:
                low, at = s[at], at + step
            ends.append(low)
        heights.append(2 * value - sum(ends))
    centres = sorted(sorted(range(len(s)), key=lambda f: (-heights[f], f))[:k])
    bounds = []
    for left, right in pairwise(centres):
        scores = {}
        for at in range(left + 1, right):
            fall = sum(s[j] - s[j + 1] for j in range(left, at))
            rise = sum(s[j] - s[j - 1] for j in range(right, at, -1))
            scores[at] = fall + rise
        bounds.append(max(scores, key=lambda at: (scores[at], -at)) if scores else left)
    if not bounds or bounds[-1] != len(s) - 1:
        bounds.append(len(s) - 1)
    first, clips = 0, []
    for bound in bounds:
        clips.append(list(range(first, bound + 1)))
        first = bound + 1
    return clips


def released_frames(s, count, clip, most):
    """Frames of the best clips, computed step by step."""
    clips = released_clips(s, math.ceil(len(s) / clip))
    ranked, kept = sorted(clips, key=lambda c: (-max(s[f] for f in c), c[0])), []
    while len(kept) < count:
        take = min(most, count - len(kept))
        chosen, ranked = sorted(ranked[:take]), ranked[take:]
        runs = []
        for frames in chosen:
            if runs and runs[-1][0][-1] + 1 == frames[0]:
                runs[-1] = (runs[-1][0] + frames, runs[-1][1] + 1)
            else:
                runs.append((frames, 1))
        given, left = [0] * len(runs), min(count - len(kept), sum(len(frames) for frames, _ in runs))
        while left:
            can = [r for r, (frames, _) in enumerate(runs) if given[r] < len(frames)]
            quota = {r: Fraction(left * runs[r][1], sum(runs[o][1] for o in can)) for r in can}
            got = {r: math.floor(quota[r]) for r in can}
            for r in sorted(can, key=lambda r: (got[r] - quota[r], r))[: left - sum(got.values())]:
                got[r] += 1
            for r in can:
                part = min(got[r], len(runs[r][0]) - given[r])
                given[r], left = given[r] + part, left - part
        for (frames, _), n in zip(runs, given, strict=True):
            if n == 1:
                kept.append(max(frames, key=lambda f: (s[f], -f)))
            kept += [frames[math.floor(Fraction(i * (len(frames) - 1), n - 1))] for i in range(n if n > 1 else 0)]
    return set(kept)


@pytest.mark.parametrize("clip", [1, 2, 4, 10])
def test_clips_are_those_of_the_released_code(clip):
    for s in curves():
        clips = [list(range(start, stop)) for start, stop in OneClipPruner(clip=clip).cut(s)]
        assert clips == released_clips(s, math.ceil(len(s) / clip))


@pytest.mark.parametrize(("clip", "most"), [(1, 16), (2, 3), (4, 1), (10, 16)])
def test_frames_equal_a_brute_force_from_one_to_all(clip, most):
    for s in curves():
        for count in {1, 2, 3, len(s) // 2, len(s) - 1, len(s)} & {*range(len(s) + 1)}:
            frames = OneClipPruner(clip=clip, clips=most).frames(s, count)
            assert frames == released_frames(s, count, clip, most) and len(frames) == count


def test_a_slope_may_have_several_centres_and_peaks_alone_may_not():
    s = [0, 9, 8, 7, 0, 1, 0]
    assert OneClipPruner(clip=3).cut(s) == [(0, 2), (2, 3), (3, 7)]
    assert OneClipPruner(clip=3, centres="peaks").cut(s) == [(0, 5), (5, 7)]


def test_shares_go_by_clips_or_by_length():
    s = [0, 0, 0, 0, 0, 0, 9, 0, 8, 0, 0, 0]  # two clips, of 8 frames and of 4
    by_clips, by_length = OneClipPruner(clip=6), OneClipPruner(clip=6, shares="length")
    assert by_clips.cut(s) == [(0, 8), (8, 12)]
    assert by_clips.shared([(0, 8), (9, 13)], [1, 1], 6) == [3, 3] and by_length.shared([(0, 8), (9, 13)], [1, 1], 6) == [4, 2]
    assert by_clips.shared([(0, 2), (9, 19)], [3, 1], 8) == [2, 6]  # the second run takes the excess of the first


def test_peaks_are_parted_at_the_lowest_frame_between_them():
    draw = random.Random(0)
    for _ in range(50):
        s = [draw.random() for _ in range(40)]
        heights = {f: 2 * s[f] - lowest(s[f::-1]) - lowest(s[f:]) for f in range(40) if is_peak(s, f)}
        centres = sorted(sorted(heights, key=lambda f: -heights[f])[:5])
        ends = [min(range(left + 1, right), key=lambda f: s[f]) for left, right in pairwise(centres)]
        assert [stop - 1 for _, stop in OneClipPruner(clip=8, centres="peaks").cut(s)] == [*ends, 39]


def test_of_equal_minima_the_earlier_is_the_boundary():
    assert boundary([3.0, 1.0, 2.0, 1.0, 3.0], 0, 4) == 1


def test_a_plateau_is_one_peak():
    for s, expected in (([0.0, 3, 1, 2, 0.5], [1, 3]), ([1.0, 1, 1], [0]), ([1.0, 2, 2, 1], [1])):
        assert [f for f in range(len(s)) if is_peak(s, f)] == expected
    assert lowest([3.0, 2.0, 2.0, 1.0, 5.0, 0.0]) == 1.0


@pytest.mark.parametrize(("fields", "whole"), [({}, [0, 8]), (OURS, [2, 6])], ids=str)
def test_two_frames_are_the_ends_of_a_run_or_the_highest_of_two_clips(fields, whole):
    relevance = [0.0, 0.2, 9.0, 0.1, 0.0, 0.1, 5.0, 0.2, 0.0, 0.1, 0.3, 0.1]  # two clips that touch, and a third
    ctx = PruneContext((TokenGrid(12, 2, 2),), 10, {"verifier_attention": torch.tensor(relevance).repeat_interleave(4)})
    shown = torch.bincount(OneClipPruner(clip=4, **fields).select(ctx).index // 4, minlength=12).tolist()
    thin = max({*range(12)} - {*whole}, key=lambda f: relevance[f])  # the rest of the budget
    assert shown == [4 if f in whole else 2 if f == thin else 0 for f in range(12)]


@pytest.mark.parametrize("count", range(1, 30))
def test_the_number_of_frames_is_exact(count):
    draw = random.Random(count)
    assert len(OneClipPruner(clip=4, clips=2, **OURS).frames([draw.random() for _ in range(30)], count)) == count


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="centres"):
        OneClipPruner(centres="peak")
    with pytest.raises(UserError, match="shares"):
        OneClipPruner(shares="frames")


def test_nan_is_refused():
    ctx = PruneContext((TokenGrid(2, 1, 1),), 1, {"verifier_attention": torch.tensor([0.1, float("nan")])})
    with pytest.raises(ValueError, match="NaN"):
        OneClipPruner().select(ctx)
