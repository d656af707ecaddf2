"""Files written by others: anything wrong is refused in one line that says what and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest
import report_jobs
from foreign import FAST, empty_folder, refused  # noqa: F401

from specvlm.__main__ import main
from specvlm.advise.__main__ import main as advise
from specvlm.app.compose import jobs
from specvlm.errors import UserError
from specvlm.fit_tree import __main__ as fit_tree
from specvlm.report.__main__ import main as report
from specvlm.report.reading import read_jobs
from specvlm.results import metrics
from specvlm.results.records import Figures
from specvlm.results.rows import rows_of, summary_of
from specvlm.strategies.datasets.folder import FolderDataset
from specvlm.strategies.datasets.local import CAPTION
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.video.clips import find_clip

BOMB = "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x,x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))])


COSTS = {
    **{"text": 20, "video": 400, "alone_ms": 8.0, "alone_first_s": 0.2, "machine": "m"},
    "timings": [{"drafter": "tree", "shape": "chain:3", "ratio": 0.9, "context": 60, "draft_ms": 3.0, "check_ms": 9.0}],
    "starts": [{"drafter": "tree", "ratio": 0.9, "first_s": 0.3, "draft_s": 0.1}],
}
BAD_COSTS = (
    *(
        {"alone_ms": -1},
        {"alone_ms": float("inf")},
        {"alone_ms": float("nan")},
        {"alone_ms": True},
        {"alone_ms": "8"},
        {"text": 2.5},
    ),
    *({"video": 10**30}, {"timings": {}}, {"timings": [5]}, {"timings": []}, {"starts": []}, {"starts": [{"drafter": "tree"}]}),
    *({"timings": [COSTS["timings"][0] | {"shape": "chain:99999"}]}, {"timings": [COSTS["timings"][0] | {"ratio": 2}]}),
)


@pytest.mark.parametrize("change", BAD_COSTS, ids=str)
def test_costs_of_wrong_types_or_beyond_bounds_are_refused(change, capfd):
    Path("costs.json").write_text(json.dumps(COSTS | change))
    said = refused(lambda: advise(["costs=costs.json", "acceptance=3.5", "hydra.run.dir=out"]), capfd)
    assert "costs=costs.json is not a costs.json of an earlier profile" in said and not Path("out").exists()


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff\xfe"])
def test_costs_that_are_no_json_are_refused(text, capfd):
    Path("costs.json").write_bytes(text.encode("latin-1"))
    refused(lambda: advise(["costs=costs.json", "acceptance=3.5"]), capfd)


def test_a_tree_is_fitted_to_a_run_that_was_killed_in_the_middle_of_a_line():
    Path("run").mkdir()
    rounds = [{"ranks": [0, 1], "widths": [2, 2, 0]}, {"ranks": [0], "widths": [2, 2]}] * 4
    Path("run/steps.jsonl").write_text("\n".join(map(json.dumps, rounds)) + '\n{"ranks": [0, 1], "wid')
    assert fit_tree.main(["run", "--out", "tree.json"]) == 0 and json.loads(Path("tree.json").read_text())


@pytest.mark.parametrize(
    "row",
    [
        {"ranks": [0], "widths": [10**8]},
        {"ranks": "0", "widths": [1]},
        {"ranks": [-1], "widths": [1]},
        {"widths": [1]},
        [1],
        {"ranks": [0] * 1025, "widths": [1]},
        {"ranks": [0], "widths": [1] * 1_000_000},
    ],
    ids=lambda row: str(row)[:40],
)
def test_rounds_of_wrong_types_or_widths_are_refused(row, capfd):
    Path("run").mkdir()
    Path("run/steps.jsonl").write_text(json.dumps(row) + "\n")
    assert "steps.jsonl" in refused(lambda: fit_tree.main(["run", "--out", "tree.json"]), capfd)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["run", "--out", "gone/tree.json"], "there is no folder gone"),
        (["run", "--nodes", "1000000000"], "at most 1024"),
        (["run", "--depth", "0"], "at most 128"),
        (["run", "--nodes", "many"], "--nodes"),
    ],
)
def test_options_of_fit_tree_are_checked(words, part, capfd):
    Path("run").mkdir()
    Path("run/steps.jsonl").write_text('{"ranks": [0], "widths": [1, 0]}\n')
    assert part in refused(lambda: fit_tree.main(words), capfd)


@pytest.mark.parametrize(
    "content",
    ["", "ratio: [", "5", "ratio: 0.9\npruner: uniform", BOMB, "video: !!binary x", "ratio: .nan", "\udcff"],
    ids=["empty", "torn", "number", "lacks", "bomb", "binary", "nan", "bytes"],
)
def test_a_report_of_a_damaged_configuration_is_one_line(content, capfd):
    folder = report_jobs.job(Path("job"), [report_jobs.row(0)])
    (folder / "config.yaml").write_text(content, errors="surrogateescape")
    assert "config.yaml" in refused(lambda: report(["job", "-o", "r.html"]), capfd)


@pytest.mark.parametrize(
    "change",
    [
        {"decode_s": -1.0},
        {"decode_s": float("nan")},
        {"kept_tokens": "5"},
        {"verdict": None},
        {"times_s": [1]},
        {"index": "0"},
        {"sample": 5},
        {"acceptance_by_depth": [0.5] * 100_000},
        {"dataset": None},
        {"split": 5},
        {"version": ["1"]},
        {"reason": 5},
        {"difference": "x"},
        {"speedup_file_to_last_token": "3"},
        {"reader": 5},
    ],
    ids=lambda change: str(change)[:40],
)
def test_rows_of_wrong_types_are_refused_wherever_they_are_read(change, capfd):
    folder = report_jobs.job(Path("job"), [report_jobs.row(0)])
    (folder / "samples.jsonl").write_text(json.dumps(report_jobs.row(0) | change) + "\n")
    with pytest.raises(UserError, match=next(iter(change))):
        rows_of(folder)
    assert "samples.jsonl" in refused(lambda: report(["job", "-o", "r.html"]), capfd)


def test_every_key_of_an_answer_has_a_type():
    assert set(metrics.KEYS) - set(metrics.OF_JOB) <= set(get_type_hints(Figures))


@pytest.mark.parametrize("key", ["dataset", "split", "version", "sample", "index", "status"])
def test_a_row_that_lacks_what_every_row_has_is_refused(key):
    line = report_jobs.row(0)
    del line[key]
    folder = report_jobs.job(Path("job"), [report_jobs.row(0)])
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=key):
        rows_of(folder)


def test_a_row_that_failed_without_a_reason_is_told_all_the_same(capfd):
    lost = {key: value for key, value in report_jobs.row(1, status="failed").items() if key != "reason"}
    folder = report_jobs.job(Path("job"), [report_jobs.row(0)])
    (folder / "samples.jsonl").write_text(json.dumps(report_jobs.row(0)) + "\n" + json.dumps(lost) + "\n")
    (job,) = read_jobs([folder])
    assert job.totals["reasons"] == {"scene-0001": None} and metrics.outcome([lost], 1)["status"] == "failed"
    (folder / "samples.jsonl").write_text(json.dumps(lost) + "\n")
    assert "nothing to report" in refused(lambda: report(["job", "-o", "r.html"]), capfd)


@pytest.mark.parametrize("wrong", ["x", {}], ids=repr)
def test_a_figure_of_the_wrong_kind_is_refused_or_does_no_harm(wrong):
    """Each key of a row, and of a run's summary, in turn."""
    row = report_jobs.row(0)
    folder = report_jobs.job(Path("job"), [row])
    run = report_jobs.job(Path("run"), [row])
    (run / "samples.jsonl").unlink()
    for file, lines in ((folder / "samples.jsonl", row), (run / "summary.json", dict.fromkeys(metrics.KEYS) | row)):
        for key in lines:
            file.write_text(json.dumps(lines | {key: wrong}) + "\n")
            try:
                (job,) = read_jobs([file.parent])
                assert json.dumps([job.totals, job.label, job.ratio])
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("gone", [key for span in metrics.SPANS for key in (f"{span}_s", f"baseline_{span}_s")])
def test_a_speed_up_is_of_the_rows_that_have_both_times(gone):
    rows = [report_jobs.row(0), report_jobs.row(1) | {gone: None}]
    span = gone.removesuffix("_s").removeprefix("baseline_")
    assert metrics.totals(rows, 2)[f"speedup_{span}"] == pytest.approx(rows[0][f"speedup_{span}"])


@pytest.mark.parametrize(
    "word", ["pruner=[1,2]", "pair=[1]", "drafter=[chain,tree]", "tracker=[wandb]", "dataset=5", "verifier={a:1}"]
)
def test_a_list_or_a_number_is_no_strategy(word, capfd):
    refused(lambda: main([word, *FAST]), capfd)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("dataset: synthetic", "dataset=synthetic"),
        ("dataset: 5", "dataset=5"),
        ("dataset: {scenes: 1}", "by name"),
        ("dataset: {name: [x]}", "by name"),
        ("tracker: wandb", "tracker=wandb"),
        ("tracker: [1]", "by name"),
        ("pruner: uniform", "uniform"),
        ('dataset: {name: folder, root: "a\\0b"}', "is not a file"),
        ('baselines: "a\\0b"\ndataset: {name: synthetic, scenes: 1}', "baselines=ab"),
        ('hydra: {run: {dir: "a\\0b"}, sweep: {dir: "a\\0b"}}', "dir=ab"),
        ('video: "a\\0b"', "ab"),
        ('target: {path: "a\\0b"}', "ab"),
    ],
)
def test_a_preset_of_wrong_kinds_is_refused_in_one_line(text, part, capfd):
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mine.yaml").write_text(f"# @package _global_\n{text}\n")
    assert part in refused(lambda: main(["--config-dir", "conf", "experiment=mine", *FAST]), capfd)


def test_a_sweep_finds_the_presets_of_config_dir():
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mine.yaml").write_text("# @package _global_\nseed: 7\n")
    found = jobs(["experiment=mine", "ratio=0.1,0.2"], sweep=True, folder=Path("conf"))
    assert [(job.cfg.seed, job.cfg.ratio) for job in found] == [(7, 0.1), (7, 0.2)]


@pytest.mark.parametrize(
    "words", [["+hydra.sweeper.params.ratio=0.1,0.2"], ["hydra.sweeper.params={ratio: 5}"], ["hydra.sweeper.params=5"]], ids=str
)
def test_keys_of_hydra_that_it_cannot_read_are_refused_in_one_line(words, capfd):
    assert "hydra.sweeper.params" in refused(lambda: main(["-m", *words, *FAST]), capfd)


def questions(*entries: dict, folder: str = "data") -> Path:
    root = Path(folder)
    root.mkdir(exist_ok=True)
    shutil.copy(find_clip("synthetic_1"), root / "a.mp4")
    (root / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return root


def test_a_csv_field_that_is_too_long_is_named_by_its_line():
    root = questions()
    (root / "q.csv").write_text("video,question\na.mp4,what?\na.mp4," + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"q\.csv, line 3: field larger"):
        FolderDataset(str(root), questions="q.csv").samples()


DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    "change",
    [
        *({"question": wrong} for wrong in (0, False, "", [], {})),
        *({"options": wrong} for wrong in (0, False, "", {}, "a", [1])),
        *({key: wrong} for key in ("start", "end", "fps") for wrong in (True, "1", [], -1, 1e300)),
        *({"id": wrong} for wrong in (None, True, [])),
        *({"answer": wrong} for wrong in (False, [], {"a": 1})),
        *({"notes": DEEP}, {"notes": {"a": DEEP}}),
    ],
    ids=lambda change: str(change)[:30],
)
def test_what_a_line_says_is_neither_replaced_nor_stretched(change):
    root = questions({"video": "a.mp4"}, {"video": "a.mp4"} | change)
    with pytest.raises(UserError, match=f"questions.jsonl, line 2: {next(iter(change))}[= ]"):
        FolderDataset(str(root)).samples()


def test_what_a_line_leaves_out_and_what_it_nests_bearably_is_taken():
    notes = json.loads("[" * 50 + "]" * 50)
    root = questions({"video": "a.mp4", "question": None, "options": None, "start": 0, "answer": 0, "id": 0, "notes": notes})
    (sample,) = FolderDataset(str(root)).samples()
    assert (sample.id, sample.answer, sample.options, sample.start) == ("0", "0", (), 0.0)
    assert sample.question == CAPTION and sample.meta == {"notes": notes}


def test_numbers_of_a_csv_are_read_from_their_texts():
    root = questions()
    (root / "q.csv").write_text("video,start,end\na.mp4,0.5,2\n")
    (sample,) = FolderDataset(str(root), questions="q.csv").samples()
    assert (sample.start, sample.end) == (0.5, 2.0)
    (root / "q.csv").write_text("video,start\na.mp4,soon\n")
    with pytest.raises(UserError, match="start='soon'"):
        FolderDataset(str(root), questions="q.csv").samples()


@pytest.mark.slow
def test_names_and_ids_that_cannot_be_fail_their_rows_alone(capfd):
    root = questions(
        {"video": "a.mp4", "id": "good"},
        {"video": "n" * 300 + ".mp4", "id": "long name"},
        {"video": "\ud800.mp4", "id": "half a name"},
        {"video": "a.mp4", "id": "\ud800\x1b[31m[/x]"},
        {"video": "a.mp4", "id": "half a letter", "question": "what\ud800?"},
        {"video": "a.mp4", "id": "book", "question": "what? " * 20_000},
    )
    assert main(["dataset=folder", f"dataset.root={root}", *FAST, "hydra.run.dir=out"]) == 5
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err and "\x1b" not in captured.out + captured.err
    assert [row["status"] for row in rows_of(Path("out"))] == ["ok", "skipped", "skipped", "ok", "failed", "failed"]


@pytest.mark.slow
def test_a_sample_taken_off_a_list_is_counted_no_longer(capfd):
    entries = [{"video": "a.mp4", "id": name} for name in ("one", "two")]
    words = [*FAST, "dataset=folder", f"dataset.root={questions(*entries)}", "hydra.run.dir=out"]
    assert main(words) == 0
    for left in (entries[1:], [entries[1], {"video": "a.mp4", "id": "three"}]):
        questions(*left)
        assert main([*words, "resume=true"]) == 0
        assert "no longer in the data set" in " ".join(capfd.readouterr().out.split())
        found = summary_of(Path("out"))
        assert (found["samples"], found["ok"], found["missing"]) == (len(left), len(left), 0)
    assert len(rows_of(Path("out"))) == 3, "what was answered stays"
    assert report(["out", "-o", "r.html"]) == 0


class Unsayable(UniformPruner):
    def __repr__(self):
        raise RuntimeError("no text")


def test_a_strategy_whose_repr_raises_is_told_by_its_name(monkeypatch, capfd):
    monkeypatch.setattr(UniformPruner, "__repr__", Unsayable.__repr__)
    assert main(["pruner=uniform", *FAST, "hydra.run.dir=out"]) == 0
    assert "uniform(its repr raises RuntimeError)" in json.loads(Path("out/summary.json").read_text())["strategies"]["pruner"]
