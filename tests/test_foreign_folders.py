"""Failing plugins, vanishing folders and disks, names in any script: the error names the cause at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import pytest
import report_jobs
from foreign import FAST, empty_folder, refused  # noqa: F401

from specvlm.__main__ import main
from specvlm.app.baselines import Baselines
from specvlm.app.compose import compose, jobs
from specvlm.app.model_cache import MODEL_CACHE
from specvlm.app.quoting import quoted
from specvlm.errors import StrategyError, UserError, one_line
from specvlm.fit_tree import __main__ as fit_tree
from specvlm.parsing import bounds, files
from specvlm.report.__main__ import main as report
from specvlm.results import metrics
from specvlm.results.rows import CannotWrite, Rows, rows_of, summary_of
from specvlm.strategies.datasets.folder import FolderDataset
from specvlm.strategies.datasets.mvbench import MVBenchDataset
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.types import Within
from specvlm.video.clips import find_clip


def questions(*entries: dict, folder: str = "data") -> Path:
    root = Path(folder)
    root.mkdir(exist_ok=True)
    shutil.copy(find_clip("synthetic_1"), root / "a.mp4")
    (root / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe"), FileNotFoundError(2, "gone", "x")]
)
def test_an_oserror_of_a_plugin_is_its_own(error, monkeypatch, capfd):
    def select(self, ctx):
        raise error

    monkeypatch.setattr(UniformPruner, "select", select)
    MODEL_CACHE.release_memory()
    assert main(["pruner=uniform", *FAST, "hydra.run.dir=out"]) == 3
    said = capfd.readouterr().err
    assert "cannot write" not in said and type(error).__name__ in said


def raising(error):
    def raises(self):
        raise error

    return raises


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (FolderDataset, "__post_init__", ["dataset=folder", "dataset.root=x"]),
        (UniformPruner, "needs", ["pruner=uniform"]),
        (UniformPruner, "needs", ["pruner=uniform", "dataset=synthetic", "dataset.scenes=1"]),
        (SyntheticDataset, "samples", ["dataset=synthetic"]),
        (SyntheticDataset, "version", ["dataset=synthetic", "dataset.scenes=1"]),
    ],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left"), FileNotFoundError(2, "gone", "x")], ids=["disk", "file"])
def test_an_oserror_before_anything_is_decoded_is_the_plugins_own_too(owner, name, words, error, monkeypatch, capfd):
    raises = raising(error)
    monkeypatch.setattr(owner, name, property(raises) if name in ("needs", "version") else raises, raising=False)
    MODEL_CACHE.release_memory()
    assert main([*words, *FAST, "hydra.run.dir=out"]) == 3
    said = capfd.readouterr().err
    assert "cannot write" not in said and type(error).__name__ in said


@pytest.mark.slow
def test_an_oserror_of_a_plugin_fails_its_row_alone(monkeypatch, capfd):
    def select(self, ctx):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(UniformPruner, "select", select)
    words = ["dataset=synthetic", "dataset.scenes=1", "pruner=uniform,two_stage", *FAST, "hydra.sweep.dir=sweep"]
    assert main(["-m", *words]) == 5
    found = [row for file in Path("sweep").glob("*/samples.jsonl") for row in rows_of(file.parent)]
    assert sorted(row["status"] for row in found) == ["failed", "ok"]
    assert "cannot write" not in capfd.readouterr().err


def test_a_job_whose_folder_goes_away_is_told_at_its_next_row():
    cfg = compose(["dataset=synthetic", "dataset.scenes=2"])
    rows = Rows(cfg, Path("job"))
    rows.begin()
    shutil.rmtree("job")
    with pytest.raises(CannotWrite, match="removed"):
        rows.step({"sample": "a"})
    with pytest.raises(CannotWrite, match="job"):
        rows.end({"sample": "a", "index": 0, "status": "failed", "reason": "x"})
    rows.close()


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["sweep", "sweep/baselines"])
def test_a_sweep_whose_folder_goes_away_ends_at_once(gone, monkeypatch, capfd):
    real, calls = Baselines.get, []

    def get(self, *args):
        calls.append(1)
        found = real(self, *args)
        if len(calls) == 2:
            shutil.rmtree(gone)
        return found

    monkeypatch.setattr(Baselines, "get", get)
    words = [
        "dataset=synthetic",
        "dataset.scenes=4",
        "pruner=uniform,two_stage",
        *FAST,
        "baseline=true",
        "hydra.sweep.dir=sweep",
    ]
    assert main(["-m", *words]) == 2
    assert "cannot write into" in capfd.readouterr().err
    assert len(calls) <= 3 and not Path(gone).exists(), "it is not made again"


@pytest.mark.parametrize("video", ["../out.mp4", "/etc/passwd", "a/../../out.mp4", "a\0.mp4", "", 5, None])
def test_a_list_names_no_video_outside_its_folder(video):
    with pytest.raises(UserError, match="expected a path below"):
        FolderDataset(str(questions({"video": video}))).samples()


def test_a_published_list_names_no_video_outside_its_folder_either():
    Path("data/json").mkdir(parents=True)
    Path("data/video").mkdir()
    entry = {"video": "../../../../x.mp4", "question": "q", "candidates": ["a"], "answer": "a"}
    Path("data/json/action_antonym.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match="expected a path below"):
        MVBenchDataset("data", tasks=("action_antonym",)).samples()


def test_a_link_that_its_owner_laid_is_followed():
    root = questions({"video": "elsewhere/a.mp4"})
    questions(folder="other")
    (root / "elsewhere").symlink_to(Path("other").resolve())
    (sample,) = FolderDataset(str(root)).samples()
    assert sample.video.exists()


@pytest.mark.parametrize("name", ["da#ta", "a, b=c", "it's", "日本 語", "[x]{y}", "a\\b"])
@pytest.mark.parametrize("sweep", [False, True])
def test_any_folder_can_be_a_root(name, sweep):
    Path(name).mkdir()
    words = quoted(["dataset=folder", f"dataset.root={name}"], sweep)
    assert [job.cfg.dataset.root for job in jobs(words, sweep)] == [name]


@pytest.mark.slow
def test_several_videos_of_a_sweep_may_have_special_characters():
    words = quoted(["video=clip#1.mp4,clip 2.mp4,c.mp4"], sweep=True)
    assert [job.cfg.video for job in jobs(words, sweep=True)] == ["clip#1.mp4", "clip 2.mp4", "c.mp4"]


def test_version_is_that_of_specvlm(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"specvlm {metrics.versions()['specvlm']}\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", [lambda: main(["--help"]), lambda: main(["--version"]), lambda: fit_tree.main(["run"])])
def test_output_that_nobody_reads_ends_quietly(program, monkeypatch, capfd):
    Path("run").mkdir()
    Path("run/steps.jsonl").write_text('{"ranks": [0], "widths": [1, 0]}\n' * 4)
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert program() == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["r.txt", "r.json", "r", "r.html.gz"])
def test_a_report_under_the_name_of_another_kind_is_refused(name, capfd):
    report_jobs.job(Path("job"), [report_jobs.row(0)])
    assert "ends in .html" in refused(lambda: report(["job", "-o", name]), capfd)
    assert not Path(name).exists()


def test_fit_tree_refuses_a_sweep_without_ranks_and_a_folder_without_rounds(capfd):
    report_jobs.sweep(Path("sweep"))
    assert "sweep records no ranks" in refused(lambda: fit_tree.main(["sweep"]), capfd)
    Path("empty").mkdir()
    assert "empty has no steps.jsonl" in refused(lambda: fit_tree.main(["empty"]), capfd)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (["ok", "ok"], "complete"),
        (["ok", "skipped"], "complete"),
        (["ok", "failed"], "incomplete"),
        (["failed", "failed"], "failed"),
        (["skipped", "failed"], "failed"),
        (["skipped", "skipped"], "failed"),
        (["ok"], "incomplete"),
    ],
)
def test_a_job_is_complete_where_every_sample_is_answered(statuses, status):
    rows = [
        report_jobs.row(index, status=state, reason=None if state == "ok" else "why") for index, state in enumerate(statuses)
    ]
    found = metrics.totals(rows, 2)
    assert found["status"] == status and bool(found["reason"]) == (status == "failed")


def test_what_is_parsed_keeps_its_types():
    assert bounds.parse(list[Annotated[int, Within(0, 5)]], [1, 5], "x") == [1, 5]
    for wrong in ([6], ["1"], [True], [1.0], 5, None):
        with pytest.raises(UserError, match="^x has "):
            bounds.parse(list[Annotated[int, Within(0, 5)]], wrong, "x")


def test_other_errors_are_told_with_their_type():
    assert one_line(StrategyError("OSError: x")) == "OSError: x" and one_line(KeyError("k")) == "KeyError: 'k'"
    assert summary_of(Path("nowhere")) == {}


def test_a_pipe_where_hydra_writes_its_own_file_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "multirun.yaml")
    assert main(["-m", "ratio=0.1,0.2", f"hydra.sweep.dir={tmp_path}"]) == 2
    assert "multirun.yaml is not a file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_among_a_jobs_files_is_refused_and_not_waited_for(kind, tmp_path, capsys):
    name = "samples.jsonl"
    report_jobs.sweep(tmp_path / "sweep")
    path = next((tmp_path / "sweep").glob(f"*/{name}"))
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert report([str(tmp_path / "sweep"), "-o", str(tmp_path / "out.html")]) == 2
    assert f"{name} is not a file" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["rb", "ab", "w"])
def test_a_pipe_is_opened_by_nobody(mode, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a file"):
        files.open_regular(tmp_path / "pipe", mode)
