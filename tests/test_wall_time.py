"""Wall time from file to first and last token: reported for every run, and absent in older rows."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from report_jobs import job, row

from specvlm.__main__ import main
from specvlm.app import console, prepare
from specvlm.report.reading import read_jobs
from specvlm.report.table import groups
from specvlm.results import metrics
from specvlm.results.rows import rows_of, summary_of

SHORT = ["frames=4", "max_new_tokens=6", "question='how many objects appear ?'"]
SLOW_S = 0.3


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def slow_file(monkeypatch):
    """Make reading take at least SLOW_S."""
    real = prepare.read_video

    def slow(*args, **options):
        time.sleep(SLOW_S)
        return real(*args, **options)

    monkeypatch.setattr("specvlm.app.prepare.read_video", slow)


def check(found: dict) -> None:
    """Check that the figures agree with their definitions."""
    reading = found["times_s"]["video"]
    for whose in ("", "baseline_"):
        assert found[f"{whose}file_to_last_token_s"] == pytest.approx(reading + found[f"{whose}end_to_end_s"])
    assert found["file_to_first_token_s"] == pytest.approx(reading + found["time_to_first_token_s"])
    assert found["baseline_file_to_first_token_s"] >= reading >= SLOW_S
    assert found["file_to_first_token_s"] < found["file_to_last_token_s"]
    quotient = found["baseline_file_to_last_token_s"] / found["file_to_last_token_s"]
    assert found["speedup_file_to_last_token"] == pytest.approx(quotient)


@pytest.mark.slow
def test_a_run_counts_what_reading_took(slow_file, capsys):
    assert main([*SHORT, "hydra.run.dir=out"]) == 0
    found = json.loads(Path("out/summary.json").read_text())
    check(found)
    shown = capsys.readouterr().out
    assert f"file to first token  {console.seconds(found['file_to_first_token_s'])} (reading the video " in shown
    assert f"file to last token   {console.seconds(found['file_to_last_token_s'])}, the target alone " in shown


@pytest.mark.slow
def test_a_job_and_the_table_of_a_sweep_count_what_reading_took(slow_file, capsys):
    """Jobs that share a read each count its time."""
    scenes = ["dataset=synthetic", "dataset.scenes=1", "dataset.ask=question", "frames=4", "max_new_tokens=6"]
    assert main(["-m", *scenes, "pruner=uniform,random", "hydra.sweep.dir=sweep"]) == 0
    folders = sorted(path.parent for path in Path("sweep").glob("*/samples.jsonl"))
    found = [rows_of(folder)[0] for folder in folders]
    for one, folder in zip(found, folders, strict=True):
        check(one)
        totals = summary_of(folder)
        assert totals["file_to_last_token_s"] == pytest.approx(one["file_to_last_token_s"])
    assert len(found) == 2 and found[0]["times_s"]["video"] == found[1]["times_s"]["video"]
    shown = capsys.readouterr().out
    assert shown.count("file to") == 2 and console.seconds(found[0]["file_to_first_token_s"]) in shown


@pytest.mark.slow
def test_without_a_baseline_there_is_no_speed_up(slow_file):
    assert main([*SHORT, "baseline=false", "hydra.run.dir=out"]) == 0
    found = json.loads(Path("out/summary.json").read_text())
    assert found["file_to_first_token_s"] >= SLOW_S
    assert found["baseline_file_to_last_token_s"] is found["speedup_file_to_last_token"] is None


def older(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in metrics.LATER}


def test_the_speed_up_of_a_job_is_the_quotient_of_its_sums():
    lines = [row(0, ours=1.0, alone=2.0), row(1, ours=3.0, alone=4.0)]
    assert metrics.totals(lines, 2)["speedup_file_to_last_token"] == pytest.approx((2.7 + 4.7) / (1.8 + 3.8))


def test_rows_of_both_kinds_are_averaged_over_those_that_have_the_figure():
    found = metrics.totals([older(row(0)), row(1, ours=2.0)], 2)
    assert found["file_to_last_token_s"] == pytest.approx(2.8) and found["decode_s"] == pytest.approx(1.5)


def test_older_rows_are_shown_with_a_dash(tmp_path):
    job(tmp_path / "new", [row(0), row(1)])
    job(tmp_path / "old", [older(row(0)), older(row(1))], ratio=0.5)
    (group,) = groups(read_jobs([tmp_path]))
    cells = {line.series + str(line.job): {cell.key: cell.text for cell in line.cells} for line in group.lines}
    texts = {tuple(of[key] for key in ("file_to_first_token_s", "file_to_last_token_s")) for of in cells.values()}
    assert texts == {("700 ms", "1.80 s"), ("–", "–")}
    assert all(of["time_to_first_token_s"] == "500 ms" for of in cells.values())
    (old,) = (summary for path in tmp_path.iterdir() if (summary := summary_of(path)).get("file_to_last_token_s") is None)
    assert list(console.totals(older(old)))[5:7] == ["-", "-"]


def test_a_single_run_of_an_older_version_is_still_reported(tmp_path):
    summary = older({key: value for key, value in row(0).items() if key in metrics.KEYS})
    folder = job(tmp_path / "run", [row(0)])
    for name in ("samples.jsonl", "summary.json"):
        (folder / name).unlink()
    (folder / "summary.json").write_text(json.dumps(summary))
    (found,) = read_jobs([tmp_path])
    assert found.totals["file_to_first_token_s"] is None and found.totals["end_to_end_s"] == 1.6
