"""Figures are those of the jobs' own totals; intervals hold what they should, and pairing narrows them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from report_jobs import job, row, scattered, sweep

pytest.importorskip("scipy")

from specvlm.errors import UserError
from specvlm.report.reading import read_jobs
from specvlm.report.statistics import bases, difference, figure, front, interval, mean_of

KEYS = ("accepted_per_round", "speedup_decode", "speedup_end_to_end")


def test_a_figure_is_that_of_the_jobs_summary(tmp_path):
    for one in read_jobs([sweep(tmp_path)]):
        summary = json.loads((one.folder / "summary.json").read_text())
        for key in KEYS:
            found = figure(one, key)
            assert found.value == pytest.approx(summary[key], rel=1e-12) and found.low < found.value < found.high


def test_an_interval_of_normal_samples_is_about_two_standard_errors_wide():
    x = np.random.default_rng(5).normal(3.0, 1.0, 400)
    found, error = mean_of(list(x)), x.std() / math.sqrt(400)
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.15 * error)


def test_95_of_100_intervals_hold_the_truth():
    dice = np.random.default_rng(1)
    held = [found.low <= 0 <= found.high for found in (mean_of(list(dice.normal(0, 1, 40))) for _ in range(200))]
    assert 0.90 <= np.mean(held) <= 0.985  # percentiles are a little narrow for 40 samples


def test_the_same_values_give_the_same_interval_and_one_gives_none():
    assert mean_of([1.0, 2.0, 4.0]) == mean_of([1.0, 2.0, 4.0])
    alone = mean_of([2.0])
    assert (alone.value, alone.low, alone.high, alone.count) == (2.0, None, None, 1) and mean_of([]) is None
    assert interval([np.full(9, 2.0)]).low == 2.0


def test_pairing_by_sample_finds_what_unpaired_intervals_hide(tmp_path):
    job(tmp_path / "a", scattered(1, 0.3), pruner__name="two_stage")
    job(tmp_path / "b", scattered(2, 0.0), pruner__name="uniform")
    better, base = read_jobs([tmp_path])
    one, other = figure(better, "accepted_per_round"), figure(base, "accepted_per_round")
    assert one.low < other.high  # the two overlap
    found = difference(better, base, "accepted_per_round")
    assert found.sure == 1 and found.value == pytest.approx(one.value - other.value) and found.count == 8
    assert difference(base, better, "speedup_decode").sure == -1
    assert difference(better, better, "speedup_decode").sure == 0


def test_only_samples_that_both_have_are_paired(tmp_path):
    job(tmp_path / "a", [row(0, 5.0), row(1, 3.0), row(2, accepted_per_round=None)], pruner__name="two_stage")
    job(tmp_path / "b", [row(1, 2.0), row(2, 4.0), row(3, 9.0)])
    better, base = read_jobs([tmp_path])
    found = difference(better, base, "accepted_per_round")
    assert (found.value, found.count) == (1.0, 1)


def test_a_speed_up_is_the_quotient_of_sums(tmp_path):
    (one,) = read_jobs([job(tmp_path / "a", [row(0, ours=1.0, alone=4.0), row(1, ours=9.0, alone=9.0)])])
    assert figure(one, "speedup_decode").value == 1.3 == one.totals["speedup_decode"]


def test_a_job_is_held_against_uniform_at_its_own_ratio(tmp_path):
    jobs = read_jobs([sweep(tmp_path)])
    for one, base in bases(jobs, None).items():
        assert base is None if one.series == "uniform" else base.label == f"uniform, {one.drops}"


def test_a_named_baseline_is_taken_at_the_same_ratio_where_it_can(tmp_path):
    jobs = read_jobs([sweep(tmp_path)])
    assert {base.label for one, base in bases(jobs, "random").items() if base} == {"random, drops 50 %", "random, drops 90 %"}
    assert {base.label for one, base in bases(jobs, "random, drops 50 %").items() if base} == {"random, drops 50 %"}
    with pytest.raises(UserError, match="Did you mean"):
        bases(jobs, "random, drops 5 %")


def test_a_job_with_no_uniform_like_it_is_held_against_nothing_where_others_are(tmp_path):
    job(tmp_path / "a", [row(0)], pruner__name="random")
    job(tmp_path / "b", [row(0)])
    job(tmp_path / "c", [row(0)], pruner__name="random", ratio=0.5)
    job(tmp_path / "d", [row(0, kept=None)], drafter__name="prompt_lookup")
    found = {one.label: base and base.label for one, base in bases(read_jobs([tmp_path]), None).items()}
    assert found.pop("random, drops 90 %") == "uniform, drops 90 %"
    assert found == {"random, drops 50 %": None, "uniform, drops 90 %": None, "prompt_lookup": None}


def test_without_uniform_the_first_job_is_the_baseline(tmp_path):
    job(tmp_path / "a", [row(0)], pruner__name="random")
    job(tmp_path / "b", [row(0)], pruner__name="fastv")
    first, second = read_jobs([tmp_path])
    assert bases([first, second], None) == {first: None, second: first}


def test_the_front_holds_what_no_other_beats():
    points = [(3.0, 3.0), (1.0, 1.0), (2.0, 2.0), (2.5, 1.5), (1.0, 0.5), (4.0, 3.0)]
    assert front(points) == [1, 2, 0]


@pytest.mark.parametrize(("count", "sure"), [(2, 0), (5, 0), (6, 1), (60, 1)])
def test_a_difference_of_few_samples_is_never_called_one(count, sure):
    """Of five samples, all have one sign by chance in 2 of 32 cases, and every resample has it too."""
    found = interval([np.linspace(1, 2, count)])
    assert found.low > 0 and found.sure == sure
    assert interval([-np.linspace(1, 2, count)]).sure == -sure
