"""From folders to jobs: shards, torn lines, single runs, names."""

from __future__ import annotations

import json

import pytest
from report_jobs import job, row, sweep

from specvlm.errors import UserError
from specvlm.report.reading import read_jobs
from specvlm.results import metrics


def labels(place) -> list[str]:
    return [one.label for one in read_jobs([place])]


def test_jobs_are_named_by_what_tells_them_apart(tmp_path):
    assert set(labels(sweep(tmp_path))) == {
        f"{pruner}, drops {share} %" for pruner in ("random", "two_stage", "uniform") for share in (50, 90)
    }


def test_a_field_of_a_pruner_is_named_only_where_jobs_of_that_pruner_differ_in_it(tmp_path):
    job(tmp_path / "a", [row(0)], pruner__name="two_stage", pruner__mass=0.2)
    job(tmp_path / "b", [row(0)], pruner__name="two_stage", pruner__mass=0.4)
    job(tmp_path / "c", [row(0)], pruner__name="uniform")
    job(tmp_path / "d", [row(0)], pruner__name="uniform", target__path="/models/large", ratio=0.25)
    target = "target=target"
    assert labels(tmp_path) == [
        f"two_stage mass=0.2 {target}, drops 90 %",
        f"two_stage mass=0.4 {target}, drops 90 %",
        f"uniform {target}, drops 90 %",
        "uniform target=large, drops 25 %",
    ]


def test_a_job_that_prunes_nothing_has_no_pruners_name_and_twins_are_numbered(tmp_path):
    job(tmp_path / "a", [row(0)])
    job(tmp_path / "b", [row(0, kept=None)], drafter__name="prompt_lookup")
    job(tmp_path / "c", [row(0, kept=None)], drafter__name="prompt_lookup", ratio=0.5)
    job(tmp_path / "d", [row(0, kept=1024)], pruner__name="none", ratio=0.5)
    job(tmp_path / "e", [row(0, verdict="lossy")], verifier__name="loose")
    usual = ["uniform, drops 90 %", "prompt_lookup #1", "prompt_lookup #2", "none, drops 0 %", "uniform loose, drops 90 %"]
    assert labels(tmp_path) == usual


def test_shards_are_one_job_and_a_torn_line_is_none(tmp_path):
    folder = job(tmp_path / "a", [])
    (folder / "samples.jsonl").unlink()
    for shard in (1, 0):
        lines = [json.dumps(row(index)) + "\n" for index in range(shard, 5, 2)]
        (folder / f"samples.{shard}-of-2.jsonl").write_text("".join(lines) + ('{"sample": "scene-00' if shard else ""))
        steps = [{"sample": f"scene-{index:04d}", "tokens": [index]} for index in range(shard, 5, 2)]
        (folder / f"steps.{shard}-of-2.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (only,) = read_jobs([folder])
    assert [line["index"] for line in only.rows] == [0, 1, 2, 3, 4] and only.steps["scene-0003"][0]["tokens"] == [3]


def test_a_run_of_one_video_is_a_job_of_one_sample(tmp_path):
    folder = job(tmp_path / "a", [], video="clips/talk.mp4")
    (folder / "samples.jsonl").unlink()
    summary = {key: value for key, value in row(0).items() if key in metrics.KEYS}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "steps.jsonl").write_text('{"tokens": [7]}\n{"tokens": [8')
    (only,) = read_jobs([tmp_path])
    assert [line["sample"] for line in only.done] == ["talk"] and only.steps == {"talk": [{"tokens": [7]}]}
    assert only.totals["accepted_per_round"] == 3.0


def test_failed_samples_are_kept_apart_from_done_ones(tmp_path):
    failed = row(1) | {"status": "failed", "reason": "no such file", "verdict": None}
    (only,) = read_jobs([job(tmp_path / "a", [row(0), failed])])
    assert len(only.rows) == 2 and [line["index"] for line in only.done] == [0]


@pytest.mark.parametrize("case", ["nothing", "empty", "failed", "damaged", "old"])
def test_what_is_no_report_is_said_in_one_line(tmp_path, case):
    place, says = tmp_path / "a", "not a results folder of python -m specvlm"
    if case == "empty":
        place.mkdir()
    if case == "failed":
        job(place, [row(0) | {"status": "failed", "reason": "no such file"}])
        says = "nothing to report: a: no such file"
    if case in ("damaged", "old"):
        (job(place, []) / "samples.jsonl").unlink()
        (place / "summary.json").write_text("{" if case == "damaged" else '{"verdict": "identical"}')
        says = "is not valid JSON" if case == "damaged" else "summary.json lacks text: another version"
    with pytest.raises(UserError, match=says):
        read_jobs([place])
