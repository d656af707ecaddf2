"""What somebody else wrote: numbers out of bounds, texts that are no code, files that are not what they should be."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
import report_jobs
import torch
import yaml

from specvlm import bounds, fit_tree, metrics, outside, registry
from specvlm.__main__ import main
from specvlm.advise.__main__ import main as advise
from specvlm.baselines import Baselines
from specvlm.compose import compose, jobs, quoted
from specvlm.data.clips import find_clip
from specvlm.datasets.folder import FolderDataset
from specvlm.datasets.local import CAPTION
from specvlm.datasets.mvbench import MVBenchDataset
from specvlm.datasets.synthetic import SyntheticDataset
from specvlm.errors import StrategyError, UserError, line, message, one_line, visible
from specvlm.held import HELD
from specvlm.pruners.uniform import UniformPruner
from specvlm.records import Figures
from specvlm.report.__main__ import main as report
from specvlm.report.reading import read_jobs
from specvlm.report.seen import see
from specvlm.rows import CannotWrite, Rows, config_of, rows_of, summary_of
from specvlm.show import Screen, Terminal, outcome, styled
from specvlm.strategy import Pruner
from specvlm.types import TreeShape, Within

FAST = ("frames=4", "max_new_tokens=3", "baseline=false")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def refused(action, capfd) -> str:
    """The one line on stderr with which a program ends."""
    assert action() == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("specvlm: ")
    return said


# ---- N1: numbers have bounds -----------------------------------------------------------------------------------------

HUGE = "99999999999999999999999"


@pytest.mark.parametrize(
    ("words", "bound"),
    [
        (["frames=16385"], "16384"),
        ([f"frames={HUGE}"], "16384"),
        (["max_new_tokens=131073"], "131072"),
        (["fps=1e308"], "1000"),
        (["fps=inf"], "1000"),
        ([f"max_pixels={HUGE}"], "67108864"),
        (["repetition_penalty=1e-300"], "0.01"),
        (["repetition_penalty=nan"], "100"),
        (["threads=100000"], "at most"),
        ([f"turn={HUGE}"], "1000000"),
        (["seed=9223372036854775808"], "9223372036854775807"),
        (["dataset=synthetic", "shard=0/99999"], "4096"),
        (["device=cuda:99999999999999999999"], "cuda:1"),
        (["drafter.shape=1000000000"], "1024 guesses"),
        (["drafter.shape=chain:20000"], "128 deep"),
        (["drafter.shape=9x9x9x9x9x9x9x9x9"], "1024 guesses"),
        (["drafter=dynamic_tree", "drafter.depth=100000000"], "128"),
        (["drafter=entropy_tree", f"drafter.nodes={HUGE}"], "1024"),
        (["drafter=prompt_lookup", "drafter.max_ngram=1000000"], "64"),
        (["drafter=sparse", "drafter.length=-1"], "128"),
        (["dataset=synthetic", f"dataset.scenes={HUGE}"], "100000"),
        (["dataset=folder", "dataset.root=x", "dataset.limit=0"], "10000000"),
        (["verifier=sampling", "verifier.temperature=1e-300"], "0.001"),
        (["pruner.mass=nan"], "at most 1"),
        (["frames=true"], "int"),
        (["frames=2.5"], "int"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_number_out_of_bounds_is_refused_with_its_bounds(words, bound):
    with pytest.raises(UserError) as caught:
        compose(words)
    assert bound in str(caught.value) and words[-1].partition("=")[0].rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [["seed=range(0,100000000)"], ["ratio=range(0,1,1e-9)"], ["seed=range(0,1,0)"], ["seed=range(0,99)", "turn=range(1,99)"]],
)
def test_a_sweep_of_too_many_jobs_is_refused_before_they_are_made(words):
    with pytest.raises(UserError, match="1000"):
        jobs(words, sweep=True)


@dataclass(frozen=True)
class BoundPruner(Pruner):
    """A plugin's."""

    name = "bound"
    plain: int = 1
    share: float = 0.5
    steps: Annotated[int, Within(1, 8)] = 2
    layers: tuple[Annotated[int, Within(0, 40)], ...] = (1,)
    twice: Annotated[int, Within(0, 9), Within(5, 7)] = 6
    ends: tuple[Annotated[int, Within(0, 1)], Annotated[int, Within(5, 10)]] = (0, 5)
    all_of: Annotated[list[Annotated[int, Within(0, 99)]], Within(10, 1000)] = field(default_factory=lambda: [50])
    many: dict[str, Annotated[int, Within(0, 5)]] | None = None

    def select(self, ctx):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({"plain": 2**40}, "2147483647"),
        ({"share": float("nan")}, "1e+30"),
        ({"steps": 9}, "at most 8"),
        ({"layers": [1, 41]}, "at most 40"),
        ({"twice": 8}, "at most 7"),
        ({"ends": [2, 5]}, "at most 1"),
        ({"ends": [1, 4]}, "at least 5"),
        ({"all_of": [5]}, "at least 10"),
        ({"all_of": [100]}, "at most 99"),
        ({"many": {"a": 6}}, "at most 5"),
    ],
)
def test_a_plugins_fields_have_the_bounds_of_their_types_and_their_own(fields, bound, monkeypatch):
    info = registry.describe(BoundPruner, "x")
    monkeypatch.setattr(registry, "find", lambda kind, name: info)
    assert registry.build("pruner", {"name": "bound", "layers": [0, 40]}).layers == (0, 40)
    with pytest.raises(UserError, match="pruner=bound: ") as caught:
        registry.build("pruner", {"name": "bound"} | fields)
    assert bound in str(caught.value)


@pytest.mark.parametrize("bounds", [(5, 1), ("a", "b"), (None, None), (float("nan"), 1), (0, "9")], ids=str)
def test_bounds_that_are_none_are_refused_where_they_are_written(bounds):
    with pytest.raises(ValueError, match="two numbers"):
        Within(*bounds)


def test_a_plugin_whose_bounds_are_none_is_left_out_with_a_reason(monkeypatch):
    @dataclass(frozen=True)
    class Swapped(Pruner):
        name = "swapped"
        steps: Annotated[int, Within(8, 1)] = 2

        def select(self, ctx):
            raise NotImplementedError

    monkeypatch.setattr(sys.modules[__name__], "Swapped", Swapped, raising=False)
    with pytest.raises(registry.PluginError, match="Swapped.*two numbers"):
        registry.describe(Swapped, "x")


BOMB = "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x,x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))])


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 100_000, "a: !!python/object/apply:os.system [ls]", "a: [1", "\0"])
def test_yaml_that_grows_nests_or_runs_is_refused(text):
    path = Path("config.yaml")
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        outside.read_yaml(path)
    Path("conf/experiment").mkdir(parents=True)
    shutil.copy(path, "conf/experiment/mine.yaml")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        jobs(["experiment=mine"], sweep=False, folder=Path("conf"))


def test_aliases_of_a_bearable_size_are_read():
    Path("a.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert outside.read_yaml(Path("a.yaml")) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("what", ["pipe", "device", "large"])
def test_what_is_no_file_or_too_large_is_not_read(what):
    path = Path("/dev/zero" if what == "device" else "x.json")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "large":
        path.touch()
        os.truncate(path, 3 << 30)
    with pytest.raises(UserError, match="is no file|has more than"):
        outside.read_bytes(path)


@pytest.mark.parametrize("text", ["[[0.5]]", "[[true]]", "[]", "[" * 9999, "null", "٣x٣", "chain:²"])
def test_a_tree_of_anything_but_whole_numbers_is_refused(text):
    with pytest.raises(ValueError, match="tree"):
        TreeShape.parse(text)


SAMPLED = ["dataset=synthetic", "dataset.scenes=1"]


@pytest.mark.parametrize(
    "words",
    [
        ["hydra.sweep.subdir=x", "ratio=0.1,0.2"],
        ["hydra.sweep.subdir=x", "ratio=0.1,0.2", *SAMPLED],
        ["ratio=0.5,0.5", *SAMPLED],
        ["resume=true,false", *SAMPLED],
        ["shard=0/2,0/2", *SAMPLED],
        ["hydra.sweep.subdir=a/../x,x", *SAMPLED],
        ["hydra.sweep.subdir=", "seed=1,2"],
    ],
    ids=" ".join,
)
def test_jobs_of_a_sweep_that_share_a_folder_are_refused_before_the_first_starts(words, capfd):
    said = refused(lambda: main(["-m", *words, *FAST, "hydra.sweep.dir=sweep"]), capfd)
    assert "jobs 1 and 2" in said and "into sweep" not in said
    assert not Path("sweep").exists()


@pytest.mark.parametrize("words", [["ratio=0.5,0.5"], ["shard=0/2,1/2", *SAMPLED], ["ratio=0.5,0.6", *SAMPLED]], ids=" ".join)
def test_jobs_of_folders_of_their_own_and_shards_are_taken(words):
    assert len(jobs([*words, "hydra.sweep.dir=sweep"], sweep=True)) == 2


# ---- N2, N3: text is text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "What does ${HOME} show?",
        "${oc.env:HOME}",
        "${",
        "a \\${b} \\\\",
        "'tis ${x",
        "choice(a) or b?",
        "it's [/b] #1, x=y",
        "'",
    ],
)
def test_a_question_on_the_command_line_is_text(text):
    assert compose(quoted([f"question={text}"], sweep=False)).question == text


def test_a_question_in_quotes_of_hydra_is_text_too():
    assert compose(quoted(["question='a ${b}, c'"], sweep=False)).question == "a ${b}, c"


@pytest.mark.parametrize("part", ["video", "target", "dataset"])
def test_what_a_folder_holds_is_never_resolved(part, monkeypatch):
    where = "${oc.env:SECRET}"
    monkeypatch.setenv("SECRET", "xyzzy-secret")
    changes = {"video": where, "target": {"path": where}, "dataset": {"name": "folder", "root": where}}
    folder = report_jobs.job(Path("job"), [report_jobs.row(0)])
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"dataset": None, part: changes[part]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    seen = see("scene-0000", read_jobs([folder]), 4)
    assert where in seen.problem and "xyzzy" not in seen.problem


@pytest.mark.parametrize("word", ["dataset.root=${oc.env:HOME}", "dataset.questions=${now:%Y}", "dataset.prompt=own"])
def test_a_strategy_built_from_what_was_read_back_is_not_resolved(word):
    key, _, value = word.partition("=")
    found = registry.build("dataset", {"name": "folder", "root": "x"} | {key.partition(".")[2]: value})
    assert value in (found.root, found.questions, found.prompt)


NASTY = "a[/b] [red]c[/] :smile: \x1b[31md\x07\r\u202ee\x9b\ud800"
PLAIN = "a[/b] [red]c[/] :smile: [31mde\ufffd"


def shown(tell) -> str:
    screen = Screen(Terminal())
    screen.console.file = StringIO()
    tell(screen)
    return screen.console.file.getvalue()


@pytest.mark.parametrize(
    "tell",
    [
        lambda screen: screen.note(NASTY),
        lambda screen: screen.console.print(NASTY),
        lambda screen: screen.console.print(styled((NASTY, "bold"), NASTY)),
        lambda screen: screen.written(Path(NASTY)),
        lambda screen: screen.jobs([(NASTY, {"reason": NASTY})], NASTY, Path(NASTY), NASTY),
        lambda screen: screen.console.print(styled(*outcome({"status": "failed", "reason": NASTY}))),
    ],
    ids=["note", "text", "styled", "folder", "table", "sample"],
)
def test_foreign_text_is_shown_as_it_is_without_control_characters(tell):
    text = shown(tell)
    assert PLAIN in text and not set("\x1b\x07\r\u202e\x9b\ud800") & set(text)


def test_messages_are_one_line_of_bearable_length():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert line("a\n\n b\x1b[0m") == "a b[0m"
    assert len(line("x" * 10_000)) < 250 and len(line("x " * 10_000)) < 1050


def test_an_error_whose_text_raises_is_told_all_the_same():
    class Worse(ValueError):
        def __str__(self):
            raise RuntimeError

    assert "RuntimeError" in message(Worse()) and one_line(Worse()).startswith("Worse: ")


def test_a_run_with_markup_in_question_and_folder_is_shown(capfd):
    assert main([*FAST, "question=what is in list[/index]? ${HOME} [bold]", "hydra.run.dir=run[/b]"]) == 0
    out = capfd.readouterr().out
    assert "list[/index]? ${HOME} [bold]" in out and "run[/b]" in out
    assert config_of(Path("run[/b]"))["question"] == "what is in list[/index]? ${HOME} [bold]"


# ---- N4: one line where one belongs ----------------------------------------------------------------------------------

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
    assert "costs=costs.json is no costs.json of an earlier profile" in said and not Path("out").exists()


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
    """Each key of a row, and of the summary of one run, in turn."""
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
        ('dataset: {name: folder, root: "a\\0b"}', "is no file"),
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
        assert "data set no longer" in " ".join(capfd.readouterr().out.split())
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


# ---- N5, N6: whose fault it is, and at once --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe"), FileNotFoundError(2, "gone", "x")]
)
def test_an_oserror_of_a_plugin_is_its_own(error, monkeypatch, capfd):
    def select(self, ctx):
        raise error

    monkeypatch.setattr(UniformPruner, "select", select)
    HELD.shed()
    assert main(["pruner=uniform", *FAST, "hydra.run.dir=out"]) == 3
    said = capfd.readouterr().err
    assert "cannot write" not in said and type(error).__name__ in said


def raising(error):
    def raises(self):
        raise error

    return raises


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
    HELD.shed()
    assert main([*words, *FAST, "hydra.run.dir=out"]) == 3
    said = capfd.readouterr().err
    assert "cannot write" not in said and type(error).__name__ in said


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


# ---- N7, N8, N9 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("video", ["../out.mp4", "/etc/passwd", "a/../../out.mp4", "a\0.mp4", "", 5, None])
def test_a_list_names_no_video_outside_its_folder(video):
    with pytest.raises(UserError, match="wanted a path below"):
        FolderDataset(str(questions({"video": video}))).samples()


def test_a_published_list_names_no_video_outside_its_folder_either():
    Path("data/json").mkdir(parents=True)
    Path("data/video").mkdir()
    entry = {"video": "../../../../x.mp4", "question": "q", "candidates": ["a"], "answer": "a"}
    Path("data/json/action_antonym.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match="wanted a path below"):
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


def test_several_videos_of_a_sweep_may_have_special_characters():
    words = quoted(["video=clip#1.mp4,clip 2.mp4,c.mp4"], sweep=True)
    assert [job.cfg.video for job in jobs(words, sweep=True)] == ["clip#1.mp4", "clip 2.mp4", "c.mp4"]


def test_version_is_that_of_specvlm(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"specvlm {metrics.versions()['specvlm']}\n"


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


@pytest.mark.parametrize("name", ["r.pdf", "r.csv", "r", "r.html.gz"])
def test_a_report_under_the_name_of_another_kind_is_refused(name, capfd):
    report_jobs.job(Path("job"), [report_jobs.row(0)])
    assert "ends in .html" in refused(lambda: report(["job", "-o", name]), capfd)
    assert not Path(name).exists()


def test_fit_tree_names_the_jobs_of_a_sweep(capfd):
    report_jobs.sweep(Path("sweep"))
    said = refused(lambda: fit_tree.main(["sweep"]), capfd)
    assert "it is a sweep" in said and "sweep/random_0.5" in said


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
    assert "multirun.yaml is no file" in capsys.readouterr().err
