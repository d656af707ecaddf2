"""The table's figures are the JSON's, and what may not stand together does not."""

from __future__ import annotations

import json

import pytest
from report_jobs import job, row, sweep

pytest.importorskip("altair")

from specvlm.report.charts import without_separators
from specvlm.report.reading import read_jobs
from specvlm.report.table import groups


def cells(line) -> dict:
    return {cell.key: cell for cell in line.cells}


def test_every_value_is_that_of_the_jobs_summary(tmp_path):
    jobs = read_jobs([sweep(tmp_path)])
    (only,) = groups(jobs)
    assert len(only.lines) == 6
    for line in only.lines:
        summary, found = json.loads((jobs[line.job].folder / "summary.json").read_text()), cells(line)
        for key in ("accepted_per_round", "speedup_decode", "speedup_end_to_end", "tokens_per_second", "peak_memory_bytes"):
            assert found[key].value == pytest.approx(summary[key], rel=1e-12)
        assert found["accepted_per_round"].text == f"{summary['accepted_per_round']:.2f}"
        assert found["verdict"].text == "8 identical" and line.view[0] == jobs[line.job].drops
    best, worst, base = (next(line for line in only.lines if line.series == s) for s in ("two_stage", "random", "uniform"))
    assert [cells(line)["accepted_per_round"].side for line in (best, worst, base)] == ["up", "down", ""]
    assert cells(best)["accepted_per_round"].against.startswith("+0.49 [+0.4") and not cells(base)["accepted_per_round"].against
    assert "uniform at the same ratio" in only.note and only.state == "good"


def test_lossy_rules_stand_apart(tmp_path):
    job(tmp_path / "a", [row(0)])
    job(tmp_path / "b", [row(0, verdict="lossy")], verifier__name="loose")
    lossless, lossy = groups(read_jobs([tmp_path]))
    assert [len(lossless.lines), len(lossy.lines)] == [1, 1] and "lossy" in lossy.verdict and lossy.state == "open"
    drawn = json.dumps([chart.spec for chart in lossless.charts])
    assert "greedy, drops 90 %" in drawn and "loose" not in drawn


def test_a_mismatch_and_a_failure_are_named(tmp_path):
    wrong = row(1, verdict="MISMATCH at token 7: the target prefers another token by 3")
    gone = row(2) | {"status": "skipped", "reason": "clips/3.mp4: no such file", "verdict": None}
    tie = row(3, verdict="numeric tie at token 4 (gap 0.001)")
    (only,) = groups(read_jobs([job(tmp_path / "a", [row(0), wrong, gone, tie])]))
    assert only.state == "bad" and only.verdict.startswith("1 of 3 answers are NOT the target's own")
    assert [line.partition(": ")[2] for line in only.problems] == [
        f"scene-0001: {wrong['verdict']}",
        f"scene-0002: {gone['reason']}",
    ]


def test_a_mismatch_by_hugging_faces_own_model_is_one_too(tmp_path):
    wrong = row(1, hf_check="MISMATCH at token 7: the answer continues after stop token 3")
    (only,) = groups(read_jobs([job(tmp_path / "a", [row(0, hf_check="identical"), wrong])]))
    assert only.state == "bad" and only.verdict.startswith("1 of 2 answers are NOT those of Hugging Face's own model")
    assert [line.partition(": ")[2] for line in only.problems] == [f"scene-0001: {wrong['hf_check']}"]


def test_what_no_job_has_is_no_column(tmp_path):
    alone = dict.fromkeys(("baseline_decode_s", "baseline_end_to_end_s", "speedup_decode", "speedup_end_to_end"))
    (only,) = groups(read_jobs([job(tmp_path / "a", [row(0, verdict="not checked") | alone])]))
    assert "speedup_decode" not in cells(only.lines[0]) and only.state == "open"
    assert {chart.name for chart in only.charts} == {"accepted", "pareto", "depth", "times"}


def test_charts_carry_the_figures(tmp_path):
    jobs = read_jobs([sweep(tmp_path)])
    specs = {chart.name: chart.spec for chart in groups(jobs)[0].charts}
    drawn = [value for values in specs["accepted"]["datasets"].values() for value in values]
    assert {(value["job"], value["value"]) for value in drawn} == {(j.label, j.totals["accepted_per_round"]) for j in jobs}
    parts = [value for values in specs["times"]["datasets"].values() for value in values if value["job"] == jobs[0].label]
    assert {value["part"]: value["seconds"] for value in parts if "part" in value} == {
        part.replace("_", " "): seconds for part, seconds in jobs[0].totals["times_s"].items() if part != "video"
    }


def test_jobs_that_drop_as_much_stand_one_below_the_other_best_first(tmp_path):
    sweep(tmp_path)
    jobs = read_jobs([tmp_path / f"{pruner}_0.9" for pruner in ("random", "two_stage", "uniform")])
    chart = next(chart for chart in groups(jobs)[0].charts if chart.name == "accepted")
    interval, points = chart.spec["layer"]
    best_first = [job.label for job in sorted(jobs, key=lambda job: -job.totals["accepted_per_round"])]
    assert points["encoding"]["y"]["sort"] == best_first and best_first[0].startswith("two_stage")
    assert interval["mark"]["type"] == "rule" and interval["encoding"]["x2"]["field"] == "high"
    (rows,) = chart.spec["datasets"].values()
    assert all(row["low"] < row["value"] < row["high"] for row in rows) and "against" not in chart.note


def test_figures_hold_no_separators_of_lines_that_vega_cannot_parse():
    spec = {"sort": ["a\u2028b"], "a\u2028b": {"value": "a\u2029b", "count": 3}}
    assert without_separators(spec) == {"sort": ["a b"], "a b": {"value": "a b", "count": 3}}
