"""V-CAST equals the formula in plain loops: shares of frames, tokens of a frame, an exact budget."""

import math

import pytest
import torch
from rounding import assert_same_sums, rounding
from specvlm_vcast import VCastPruner, curvature

from specvlm.errors import UserError
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid

TERMS = 7 + 4 * 5 + 6  # of a score: a mean of at most 7 tokens, an inner product and three lengths of width 5, the rest


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.1, "least": 0}, {"least": 3}], ids=str)
def test_contract(fields):
    check_pruner(VCastPruner, **fields)


def select(x_FPD, budget, **fields):
    frames, per_frame, _ = x_FPD.shape
    grid = TokenGrid(frames, 1, per_frame)
    return VCastPruner(**fields).select(PruneContext((grid,), budget, {"features": x_FPD.flatten(0, 1)})).index.tolist()


def cosine(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (max(math.hypot(*a), 1e-6) * max(math.hypot(*b), 1e-6))


def means(video):
    found = [[math.fsum(column) / len(frame) for column in zip(*frame, strict=True)] for frame in video]
    return [[x / max(math.hypot(*mean), 1e-6) for x in mean] for mean in found]


def turns(video):
    mean = means(video)
    found = [1.0] * len(video)
    for t in range(1, len(video) - 1):
        step_in = [b - a for a, b in zip(mean[t - 1], mean[t], strict=True)]
        step_out = [b - a for a, b in zip(mean[t], mean[t + 1], strict=True)]
        found[t] = 1 - cosine(step_in, step_out)
    return found


def naive_shares(turn, budget, per_frame, temperature=0.7, least=1):
    """Token by token: the minimum, the integer parts, then the remainder by largest fractions."""
    share = [least if budget >= least * len(turn) else 0 for _ in turn]
    rest = budget - sum(share)
    total = math.fsum(math.exp(c / temperature) for c in turn)
    wanted = [math.exp(c / temperature) / total * rest for c in turn]
    for frame, part in enumerate(wanted):
        for _ in range(math.floor(part)):
            if share[frame] < per_frame:
                share[frame] += 1
    while sum(share) < budget:
        for frame in sorted(range(len(turn)), key=lambda t: (-(wanted[t] - math.floor(wanted[t])), t)):
            if sum(share) < budget and share[frame] < per_frame:
                share[frame] += 1
    return share


def naive_scores(frame, mean):
    length = [math.hypot(*token) for token in frame]
    span = max(length) - min(length) + 1e-6
    return [1 - cosine(token, mean) + (n - min(length)) / span for token, n in zip(frame, length, strict=True)]


def videos():
    """Videos in float64: random, static, with alternating scenes, of one and two frames, of equal tokens."""
    generator = torch.Generator().manual_seed(0)
    for number in range(50):
        frames, per_frame = 1 + number % 9, 1 + number % 7
        x = torch.randn(frames, per_frame, 5, generator=generator, dtype=torch.float64)
        kind = ("random", "static", "alternating", "drifting", "equal")[number // 10]
        if kind == "static":
            x = x[:1].expand_as(x)
        elif kind == "alternating":
            x = x[[t % 2 if frames > 1 else 0 for t in range(frames)]]
        elif kind == "drifting":
            x = x.cumsum(0)
        elif kind == "equal":
            x = torch.nn.functional.one_hot(torch.randint(0, 4, (frames, per_frame), generator=generator), 5).double()
        yield pytest.param(x.contiguous(), id=f"{kind}{number}")


@pytest.mark.parametrize("x_FPD", list(videos()))
def test_it_equals_the_formula_in_plain_loops(x_FPD):
    frames, per_frame, _ = x_FPD.shape
    video = x_FPD.tolist()
    turn, mean = turns(video), means(video)
    assert_same_sums(curvature(torch.tensor(mean, dtype=torch.float64)), torch.tensor(turn, dtype=torch.float64), TERMS, 3.0)
    scores_F = [naive_scores(frame, mean[t]) for t, frame in enumerate(video)]
    for budget in range(1, frames * per_frame):
        keep = select(x_FPD, budget)
        share = naive_shares(turn, budget, per_frame)
        assert [sum(k // per_frame == t for k in keep) for t in range(frames)] == share
        for t, count in enumerate(share):
            scores = scores_F[t]
            mine = [scores[k % per_frame] for k in keep if k // per_frame == t]
            # Of scores that differ only by rounding, any may be kept; ties of equal tokens have their own test.
            best, bound = sorted(scores, reverse=True)[:count], rounding(TERMS, 3.0)
            assert sorted(mine, reverse=True) == pytest.approx(best, rel=0, abs=bound)


def test_a_frame_where_the_video_turns_back_gets_more_than_one_it_passes_through():
    """Means at angles 0, 10, 20, 30, 20, 10, 0 degrees: only the middle frame turns, by 180 degrees."""
    angles = torch.tensor([0.0, 10, 20, 30, 20, 10, 0], dtype=torch.float64).deg2rad()
    mean = torch.stack([angles.cos(), angles.sin()], 1)
    turn = curvature(mean)
    small = 1 - math.cos(math.radians(10))
    # A step of 10 degrees has length 0.17, so the rounding of differences counts more in the quotient.
    assert_same_sums(turn, torch.tensor([1, small, small, 2, small, small, 1], dtype=torch.float64), TERMS, 3 / 0.17)
    share = VCastPruner().shares(turn.tolist(), 28, 20)
    assert share == naive_shares(turn.tolist(), 28, 20) and share[3] == max(share) > 2 * share[1]


def test_what_rounding_leaves_over_goes_to_several_frames():
    assert VCastPruner().shares([1.0] * 5, 14, 9) == [3, 3, 3, 3, 2]
    assert VCastPruner(least=0).shares([1.0] * 4, 3, 9) == [1, 1, 1, 0]


def test_a_full_frame_passes_on_what_it_cannot_hold():
    assert VCastPruner(temperature=0.01).shares([1.0, 2.0, 1.0], 10, 4) == [3, 4, 3]


def test_fewer_tokens_than_frames_go_to_the_frames_that_turn():
    assert VCastPruner().shares([1.0, 0.1, 2.0, 0.1, 1.0], 1, 4) == [0, 0, 1, 0, 0]


def test_equal_tokens_go_by_their_order():
    assert select(torch.ones(3, 4, 2), 7) == [0, 1, 2, 4, 5, 8, 9]


def test_a_token_that_stands_out_and_a_strong_one_are_kept():
    x_FPD = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [3, 0], [1, 0]]])
    assert select(x_FPD, 2) == [2, 3]


def test_a_temperature_of_0_and_a_negative_minimum_are_refused():
    with pytest.raises(UserError, match="temperature"):
        VCastPruner(temperature=0.0)
    with pytest.raises(UserError, match="least"):
        VCastPruner(least=-1)


def test_videos_are_treated_alone_and_newline_tokens_come_last():
    generator = torch.Generator().manual_seed(1)
    first, second = TokenGrid(3, 1, 4, newline=1), TokenGrid(4, 1, 4, newline=1)
    x_ND = torch.randn(30, 5, generator=generator)
    keep = VCastPruner().select(PruneContext((first, second), 15, {"features": x_ND})).index
    alone = select(x_ND[:12].view(3, 4, 5), 7)  # 13 of 30 tokens get 6.5 of 15, and of equal remainders the first is rounded up
    assert keep[keep < 13].tolist() == alone and len(keep) == 15
    assert 12 not in keep and 29 not in keep
