"""two_stage against the formula of the paper, worked out in fractions, and its per-frame spread."""

import json
import zlib
from fractions import Fraction
from math import floor

import pytest
import torch

from specvlm.app.compose import compose
from specvlm.errors import UserError
from specvlm.strategies import PruneContext, registry
from specvlm.strategies.pruners import TwoStagePruner, UniformPruner
from specvlm.types import TokenGrid


def brute_force(scores, budget, mass):
    """The smallest set that holds `mass` of the attention, cut to the budget; then every so-manieth leftover."""
    most = budget
    if mass == "auto":
        mass, most = 0.4, budget // 8
    exact = [Fraction(score) for score in scores]
    ranked = sorted(range(len(exact)), key=lambda j: (-exact[j], j))
    stage_one = next(n for n in range(len(exact) + 1) if sum(exact[j] for j in ranked[:n]) >= Fraction(str(mass)) * sum(exact))
    kept = set(ranked[: min(stage_one, most)])
    rest = [j for j in range(len(exact)) if j not in kept]
    count = budget - len(kept)
    if count == 1:
        kept.add(rest[0])
    for i in range(count if count > 1 else 0):
        kept.add(rest[floor(Fraction(i * (len(rest) - 1), count - 1))])
    return sorted(kept)


def invented_scores(kind, total, generator):
    """Score vectors of the kinds that matter: long-tailed as attention is, with ties, with zeros, all equal."""
    uniform = torch.rand(total, generator=generator)
    return {
        "long_tail": uniform**8 / 100,
        "softmax": (8 * uniform).softmax(0),
        "small_integers": (uniform * 4).floor(),
        "sevenths": (uniform * 7).floor() / 7,
        "mostly_zero": torch.where(uniform < 0.8, torch.zeros(total), uniform),
        "equal": torch.full((total,), float(uniform[0]) / total),
        "zero": torch.zeros(total),
        "one_peak": torch.where(uniform == uniform.max(), 1.0, 1e-6),
    }[kind]


KINDS = ["long_tail", "softmax", "small_integers", "sevenths", "mostly_zero", "equal", "zero", "one_peak"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keep_sets_equal_brute_force_on_200_score_vectors(dtype):
    generator = torch.Generator().manual_seed(20)
    for number in range(200):
        total = int(torch.randint(2, 80, (), generator=generator))
        scores = invented_scores(KINDS[number % len(KINDS)], total, generator).to(dtype)
        drawn = [0.4, 0.5, 0.1, 0.07, 0.9, 1.0, 0.55, 1 / 3][int(torch.randint(8, (), generator=generator))]
        for budget in sorted({1, 2, total - 1, total, int(torch.randint(1, total + 1, (), generator=generator))}):
            ctx = PruneContext((TokenGrid(1, 1, total),), budget, {"verifier_attention": scores})
            for mass in (drawn, "auto"):
                kept = TwoStagePruner(mass).select(ctx).index.tolist()
                assert kept == brute_force(scores.tolist(), budget, mass), (number, total, budget, mass)


def keep(scores, budget, grids=None, **fields):
    scores = torch.as_tensor(scores)
    grids = grids or (TokenGrid(1, 1, len(scores)),)
    return TwoStagePruner(**fields).select(PruneContext(grids, budget, {"verifier_attention": scores})).index.tolist()


@pytest.mark.parametrize("share", range(1, 99))
def test_a_share_of_equal_scores_is_counted_exactly(share):
    # Two tokens are left to stage II, which takes the first and the last leftover. In floats, 0.07 * 100 is above 7.
    assert keep([1 / 300] * 100, share + 2, mass=share / 100) == [*range(share + 1), 99]


def test_stage_one_takes_the_smallest_set_that_reaches_the_mass():
    # 4 + 3 of 10 reach 0.7 exactly, so the third best is left to stage II, which takes the first and last leftover.
    assert keep([1.0, 0.0, 4.0, 2.0, 3.0, 0.0], 4, mass=0.7) == [0, 2, 4, 5]
    assert keep([1.0, 0.0, 4.0, 2.0, 3.0, 0.0], 4, mass=0.71) == [0, 2, 3, 4]


def test_stage_one_that_fills_the_budget_leaves_nothing_to_stage_two():
    assert keep([1.0, 9.0, 1.0, 9.0], 2, mass=0.9) == [1, 3]
    assert keep([1.0, 9.0, 1.0, 9.0], 1, mass=0.4) == [1]


def test_stage_one_may_cover_every_token():
    assert keep([1.0, 2.0, 3.0], 3, mass=1.0) == [0, 1, 2]


@pytest.mark.parametrize("budget", [1, 3, 9])
def test_no_attention_at_all_is_uniform(budget):
    ctx = PruneContext((TokenGrid(5, 1, 2),), budget)
    assert keep([0.0] * 10, budget) == UniformPruner().select(ctx).index.tolist()


def test_scores_of_any_scale_give_the_same_tokens():
    scores = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) ** 6
    assert keep(scores, 20) == keep(scores * 2.0**-120, 20) == keep(scores * 2.0**90, 20)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
@pytest.mark.parametrize("spread", ["linspace", "frame"])
def test_attention_that_cannot_be_is_refused_in_a_sentence(bad, spread):
    with pytest.raises(ValueError, match="attention must be finite and not negative, got values from"):
        keep([0.5, bad, 0.25], 2, spread=spread)


def stage_one(scores, budget):
    """How many tokens stage I of `auto` takes."""
    scores = torch.as_tensor(scores)
    return TwoStagePruner("auto").stage_one(scores.sort(descending=True, stable=True).values, budget)


@pytest.mark.parametrize("budget", [1, 7, 8, 9, 99, 100, 400])
def test_auto_leaves_seven_eighths_of_the_budget_to_stage_two_however_attention_spreads(budget):
    generator = torch.Generator().manual_seed(budget)
    for kind in KINDS:
        scores = invented_scores(kind, 400, generator)
        assert stage_one(scores, budget) <= budget // 8, kind
        assert len(keep(scores, budget, mass="auto")) == budget
    assert stage_one([1.0] * 400, budget) == budget // 8  # flat: 0.4 of it would be 160 tokens
    assert stage_one([1000.0] + [1.0] * 399, budget) == min(budget // 8, 1)  # peaked: one token has more than 0.4
    assert stage_one([0.0] * 400, budget) == 0


def test_auto_takes_the_earlier_of_equals_and_samples_the_rest_evenly():
    # Stage I: an eighth of 8, of four equals the first; of the eleven others, stage II takes 0, 1, 3, 5, 6, 8 and 10.
    assert keep([1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 8, mass="auto") == [0, 1, 2, 4, 6, 7, 9, 11]


def test_auto_is_the_papers_mass_where_that_stays_within_its_part():
    generator = torch.Generator().manual_seed(6)
    for number in range(40):
        scores = invented_scores("long_tail", 200, generator)
        free = TwoStagePruner(0.4).stage_one(scores.sort(descending=True).values, 200)
        for budget in (8 * free - 1, 8 * free, 190):
            same = keep(scores, budget, mass="auto") == keep(scores, budget, mass=0.4)
            assert same or free > budget // 8, (number, budget, free)


def test_auto_with_several_videos_ranks_their_tokens_together():
    grids = (TokenGrid(2, 2, 2, newline=1), TokenGrid(3, 1, 4))
    scores = torch.zeros(21)
    scores[[8, 12, 19]] = 1.0  # the newline of the first, and two tokens of the second: two of three reach 0.4
    for spread in ("linspace", "frame"):
        assert {8, 12} <= {*keep(scores, 16, grids, mass="auto", spread=spread)}
    assert keep(scores, 16, grids, mass="auto") == brute_force(scores.tolist(), 16, "auto")


def test_the_papers_mass_keeps_what_it_kept_before_there_was_auto():
    generator, kept = torch.Generator().manual_seed(44), []
    grids = (TokenGrid(3, 4, 5, newline=1), TokenGrid(2, 3, 4))
    for number in range(24):
        scores = (torch.randint(0, 3 + number, (85,), generator=generator) ** (1 + number % 4)).float()
        for budget in (1, 8, 21, 42, 84):
            kept += [keep(scores, budget, grids, spread=spread) for spread in ("linspace", "frame")]
    assert zlib.crc32(json.dumps(kept).encode()) == 2558973922  # of commit a0cfa4d


@pytest.mark.parametrize(("word", "mass"), [("auto", "auto"), ("0.2", 0.2), ("1", 1.0), ("'0.3'", 0.3)])
def test_mass_is_a_number_or_auto(word, mass):
    found = registry.build("pruner", compose([f"pruner.mass={word}"]).pruner).mass
    assert found == mass and type(found) is type(mass)
    assert registry.build("pruner", {"name": "two_stage", "mass": mass}) == TwoStagePruner(mass)


@pytest.mark.parametrize("word", ["-1", "0", "1.01", "nan", "inf", "autoo", "AUTO", "''", "9" * 400])
def test_a_mass_that_is_none_is_refused_in_a_line_that_says_what_is_allowed(word):
    with pytest.raises(UserError) as caught:
        compose([f"pruner.mass={word}"])
    text = str(caught.value)
    assert "mass must be above 0 and at most 1, or auto, got " in text and "\n" not in text and len(text) < 600
    assert ('Did you mean "auto"?' in text) == (word == "autoo")


@pytest.mark.parametrize("word", ["true", "null", "[0.2]", "{a:1}"])
def test_a_mass_of_another_type_is_refused(word):
    with pytest.raises(UserError, match=r"^pruner.mass=.*: expected float \| str"):
        compose([f"pruner.mass={word}"])


@pytest.mark.parametrize("mass", [0.0, -0.4, 1.01, float("nan"), "autoo", "0.4"])
def test_mass_out_of_range_is_refused(mass):
    with pytest.raises(ValueError, match="mass must be above 0 and at most 1"):
        TwoStagePruner(mass=mass)


def test_unknown_spread_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"linspace or frame, got 'frames'\. Did you mean .frame"):
        TwoStagePruner(spread="frames")


def per_frame(kept, grids):
    """Kept tokens a frame; newline tokens are counted nowhere."""
    counts, start = [], 0
    for grid in grids:
        for frame in range(grid.frames):
            first = start + frame * grid.per_frame
            counts.append(sum(first <= token < first + grid.per_frame for token in kept))
        start += len(grid)
    return counts


def test_spread_frame_gives_every_frame_the_same_share_of_stage_two():
    grids = (TokenGrid(8, 4, 4),)
    peak = torch.zeros(128)
    peak[35] = 1.0  # stage I: one token of frame 2
    counts = per_frame(keep(peak, 25, grids, spread="frame"), grids)
    assert counts == [3, 3, 4, 3, 3, 3, 3, 3]
    counts = per_frame(keep(peak, 29, grids, spread="frame"), grids)
    assert sorted(counts) == [3, 3, 3, 4, 4, 4, 4, 4]


def test_spread_frame_is_more_even_than_linspace():
    # Stage I takes half of frame 0. Of 12 more, linspace gives the frames 2, 3, 4 and 3: it strides over leftovers.
    grids = (TokenGrid(4, 2, 4),)
    scores = torch.zeros(32)
    scores[:4] = 1.0
    assert per_frame(keep(scores, 16, grids, mass=1.0), grids) == [4 + 2, 3, 4, 3]
    assert per_frame(keep(scores, 16, grids, mass=1.0, spread="frame"), grids) == [4 + 3, 3, 3, 3]


def test_spread_frame_reaches_every_frame_that_stage_one_left_empty():
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        frames, height, width, newline = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(4))
        grids = (TokenGrid(frames, height, width, newline % 2), TokenGrid(2, width, height, newline // 4))
        total = sum(map(len, grids))
        scores = torch.rand(total, generator=generator) ** 12
        budget = int(torch.randint(1, total + 1, (), generator=generator))
        first = keep_first(scores, budget)
        empty = per_frame(first, grids).count(0)
        kept = keep(scores, budget, grids, spread="frame")
        assert set(first) <= set(kept)
        assert len(kept) == budget
        if budget - len(first) >= empty:
            assert min(per_frame(kept, grids)) >= 1


def keep_first(scores, budget):
    """Stage I by definition."""
    ranked = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
    total, sums, first = float(scores.double().sum()), 0.0, []
    while len(first) < budget and sums < 0.4 * total:
        first.append(ranked[len(first)])
        sums += float(scores[first[-1]])
    return first


def test_spread_frame_with_one_token_a_frame_covers_frames_and_moves_about_in_them():
    grids = (TokenGrid(16, 4, 4),)
    kept = keep(torch.zeros(256), 16, grids, spread="frame")
    assert per_frame(kept, grids) == [1] * 16
    assert sorted(token % 16 for token in kept) == list(range(16))  # each cell of the picture once


def test_spread_frame_puts_one_token_in_each_quarter_of_a_frame():
    for height, width in ((4, 4), (8, 8), (4, 16), (6, 10)):
        kept = keep(torch.zeros(height * width), 4, (TokenGrid(1, height, width),), spread="frame")
        quarters = {(token // width * 2 // height, token % width * 2 // width) for token in kept}
        assert len(quarters) == 4, (height, width, kept)


def test_spread_frame_takes_the_newline_last():
    grids = (TokenGrid(2, 2, 2, newline=1), TokenGrid(1, 1, 2, newline=1))
    assert keep(torch.zeros(12), 10, grids, spread="frame") == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert keep(torch.zeros(12), 11, grids, spread="frame") == [*range(11)]
