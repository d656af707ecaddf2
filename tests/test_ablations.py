"""The ablations: which job belongs to which experiment, how verdicts follow from rows, and pages match the rows."""

import gzip
import json
import os
import re
import sys
from collections import defaultdict
from statistics import fmean

import pytest
import report_jobs
import sweeping
import torch
from omegaconf import OmegaConf

from experiments.ablations import findings, presets, rows, small, tables
from experiments.ablations.__main__ import main
from experiments.ablations.presets import BASES, label_of, planned, settings_of
from experiments.ablations.rows import ROOT, Results
from experiments.real_footage import __main__ as footage
from experiments.strategies.report import TITLES
from specvlm.app import compose
from specvlm.errors import UserError
from specvlm.report.statistics import Interval
from specvlm.results.folder import write_attention
from specvlm.results.rows import plain

QWEN, LLAVA = TITLES


def rounds_of(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def config(*words):
    """Make a configuration as a job writes it."""
    return plain(compose.compose(["dataset=synthetic", "drafter=tree", *words]))


def label(*words):
    return label_of(settings_of(config(*words), QWEN))


def row(job, accepted, scene="s0", family=QWEN, **changes):
    of = {"family": family, "job": job, "scene": scene, "tokens": 9, "kept": 1, "video": 10, "accepted": accepted}
    return of | {"verdict": "identical", "decode": [1.0, 2.0], "end_to_end": [2.0, 2.0], "engine": "eager"} | changes


def results(**jobs):
    """Make rows of each job, one scene per list of rounds. In names, `_` is a space and `__` an underscore."""
    names = {name: name.replace("__", "%").replace("_", " ").replace("%", "_").replace("0 ", "0.") for name in jobs}
    return Results(row(names[name], each, f"s{n}") for name, some in jobs.items() for n, each in enumerate(some))


# ---- which job belongs to which experiment ---------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_are_matched_by_what_they_are_not_by_how_they_were_run():
    usual = settings_of(config(), QWEN)
    for words in (["frames=32"], ["record=true", "baseline=false", "threads=2"], ["device=cpu", "engine=eager"]):
        assert settings_of(config(*words), QWEN) == usual
    assert settings_of(config("dataset.scenes=3", "dataset.first=8"), QWEN) == usual
    assert settings_of(config("frames=16"), LLAVA) == usual != settings_of(config("frames=32"), LLAVA)
    for word in ("frames=16", "dtype=bfloat16", "verifier=sampling", "dataset.ask=question", "seed=1", "max_new_tokens=9"):
        assert settings_of(config(word), QWEN) != usual
    other = presets.family_of(config("pair=embedded_qwen2_5_vl_aware"))
    assert (presets.family_of(config()), presets.family_of(config("pair=embedded_llava_onevision")), other) == (
        QWEN,
        LLAVA,
        None,
    )


@pytest.mark.slow
def test_where_all_or_nothing_is_kept_every_pruner_is_the_same():
    assert {label("pruner=none", "ratio=0.5"), label("ratio=0"), label("pruner=random", "ratio=0")} == {"none"}
    assert label("pruner=none", "positions=reindexed") == "none positions=reindexed"  # M-RoPE loses its rows and columns
    assert label("pruner=uniform", "ratio=1") == label("pruner.mass=0.2", "ratio=1") == "text only"
    assert label("pruner=none", "drafter=self") == "none drafter=self" and label("pruner=none", "frames=4") == "none frames=4"
    assert label("pruner=window") == "window 0.9" and label("pruner.mass=0.2", "ratio=0.5") == "two_stage 0.5 mass=0.2"


@pytest.mark.slow
def test_every_preset_is_its_experiment():
    counts = {experiment: len(planned(experiment, family)) for experiment in BASES for family in TITLES}
    assert counts == {
        "main_table": 14,
        "ratio_by_pruner": 22,
        "stage_one_mass": 7,
        "positions": 4,
        "tree_shapes": 7,
        "frames": 8,
    }
    ratios = {(job.settings["pruner.name"], job.settings["ratio"]) for job in planned("ratio_by_pruner", QWEN)}
    pruners = ("two_stage", "uniform", "random", "verifier_attention")
    assert ratios == {("none", 0), ("any", 1)} | {(name, r) for name in pruners for r in (0.25, 0.5, 0.75, 0.9, 0.95)}
    frames = [[job.label for job in planned("frames", family)][::2] for family in TITLES]
    assert frames[0] == ["none frames=4", "none frames=8", "none frames=16", "none"]
    assert frames[1] == ["none frames=4", "none frames=8", "none", "none frames=32"]
    bases = {job.label: presets.bases_of("main_table", job) for job in planned("main_table", QWEN)}
    assert bases["window 0.9 drafter=self"] == {
        "none": "none drafter=self",
        "uniform": "uniform 0.9 drafter=self",
        "tree": "window 0.9",
    }
    assert bases["uniform 0.9"] == {"none": "none", "uniform": None, "tree": None}
    assert presets.bases_of("positions", planned("positions", QWEN)[2]) == {"original": "two_stage 0.5"}


# ---- from folders to rows --------------------------------------------------------------------------------------------


JOBS = (["pruner=none", "record=true"], ["ratio=0.9"], ["drafter=self"], ["verifier=sampling"], ["pruner=none"],
        ["pair=embedded_llava_onevision", "drafter=self", "record=true"])  # fmt: skip
SCENES = (range(4), range(4), range(4), range(4), range(3, 6), range(2))


@pytest.fixture
def sweep(tmp_path):
    """Write jobs of two shards each: one with scenes in a second folder too, one of the other family, one of none.

    The rounds of scene n are [n, 4, a truncated round].
    """
    for number, words in enumerate(JOBS):
        folder = tmp_path / "sweep" / f"job{number}"
        steps = {
            f"scene-{n:04d}": [{"accepted": a, "full": full} for a, full in ((0, True), (n, True), (4, True), (1, False))]
            for n in SCENES[number]
        }
        lines = [report_jobs.row(n, (n + 4) / 2, rounds=3, engine={"target": "eager"}) for n in SCENES[number]]
        if number == 1:
            lines[3] |= {"status": "failed", "reason": "no memory"}
        report_jobs.job(folder, lines, steps)
        OmegaConf.save(config(*words, "dataset.scenes=4"), folder / "config.yaml")
        for what, each in (("samples", 1), ("steps", 4)):
            whole = (folder / f"{what}.jsonl").read_text().splitlines(keepends=True)
            (folder / f"{what}.jsonl").unlink()
            for shard in (0, 1):
                mine = (line for place, line in enumerate(whole) if place // each % 2 == shard)
                (folder / f"{what}.{shard}-of-2.jsonl").write_text("".join(mine))
        if "record=true" in words:
            for n in SCENES[number]:
                write_attention(folder, n, torch.cat([torch.full((10,), 6.0), torch.full((90,), 0.5)]))
    return tmp_path / "sweep"


@pytest.mark.slow
def test_folders_become_rows_of_whole_rounds_in_every_experiment_that_has_the_job(sweep, tmp_path):
    found = rows.gather([sweep])
    assert found.told == [
        "job3: of no experiment",
        f"{QWEN}, two_stage 0.9: 3 of 4 scenes; 1 failed: no memory",
        f"{LLAVA}, two_stage 0.9 drafter=self: 2 of 4 scenes",
    ]
    (tmp_path / "out" / "frames").mkdir(parents=True)
    old = [{"family": LLAVA, "machine": None, "versions": []}, row("none", [5], family=LLAVA), row("none", [5], "gone")]
    (tmp_path / "out" / "frames" / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in old))
    rows.write(found, "rows", tmp_path / "out")
    written = {path.parent.name: Results(rows.read(path)) for path in (tmp_path / "out").glob("*/rows.jsonl")}
    assert set(written) == set(BASES)
    main_table = written["main_table"]
    assert {job for _, job in main_table.found} == {"none", "two_stage 0.9", "two_stage 0.9 drafter=self"}
    assert [one["accepted"] for one in main_table.of(QWEN, "none")] == [[n, 4] for n in range(6)]
    assert main_table.of(QWEN, "none")[2] | {"accepted": 0} == row("none", 0, "scene-0002") | {
        "tokens": 100, "kept": 102, "video": 1024, "decode": [1.0, 2.0], "end_to_end": [1.6, 2.5],
    }  # fmt: skip
    assert {job for _, job in written["stage_one_mass"].found} == {"two_stage 0.9"}
    frames = written["frames"]
    assert frames.families == [QWEN, LLAVA] and len(frames.of(LLAVA, "none")) == 1 and len(frames.of(QWEN, "none")) == 6
    attention = rows.read(tmp_path / "out" / "findings" / "attention.jsonl")
    assert [line["family"] for line in attention] == [QWEN] * 4 + [LLAVA] * 2 and attention[0]["top"]["0.1"] == pytest.approx(
        60 / 105, abs=1e-3
    )
    rounds = rounds_of(tmp_path / "out" / "main_table" / "steps" / f"{QWEN}-none.jsonl.gz")
    assert len(rounds) == 24 and rounds[1] == {"sample": "scene-0000", "accepted": 0, "full": True}


def test_what_does_not_fit_together_is_named_or_refused(sweep, tmp_path):
    """A second folder with other rounds for a scene; rounds that differ from the row's; fewer scenes than committed."""
    whole = rows.gather([sweep])
    rows.write(whole, "rows", tmp_path)
    assert next(iter(rows.missing(whole, [LLAVA]))).startswith(f"{LLAVA}: no rows of none, random 0.9, ")
    with pytest.raises(UserError, match=r"main_table/rows.jsonl would lose rows \(.*none has 4 scenes here, and 6 there\)"):
        rows.write(rows.gather([sweep / "job0"]), "rows", tmp_path)
    rows.write(rows.gather([sweep / "job0"]), "rows", tmp_path, fewer=True)
    assert len(rows.read(tmp_path / "frames" / "rows.jsonl")) == 5

    def change(folder, what, key, value):
        for file in folder.glob(f"{what}*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for line in lines:
                line |= {key: value} if line["sample"] == "scene-0003" and line.get("round", 2) == 2 else {}
            file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    change(sweep / "job4", "steps", "accepted", 1)
    with pytest.raises(UserError, match="rounds of scene-0003 are not those of its row"):
        rows.gather([sweep / "job4"])
    change(sweep / "job4", "samples", "accepted_per_round", 1.0)
    told = rows.gather([sweep / "job0", sweep / "job4"]).told
    assert told == [f"{QWEN}, none: scene-0003 of {sweep / 'job4'} accepts otherwise than before"]


def test_speed_is_a_file_of_its_own_with_the_name_of_its_machine(sweep, tmp_path):
    paths = rows.write(rows.gather([sweep], "a quiet one"), "speed", tmp_path)
    assert {path.name for path in paths} == {"speed.jsonl"} and not list(tmp_path.glob("findings/*"))
    text = "\n".join(tables.section("main_table", Results(rows.read(tmp_path / "main_table" / "speed.jsonl")), "speed"))
    assert "| `none` | 6 | 2.00 × [2.00, 2.00] | 1.56 × [1.56, 1.56] | eager |" in text and "a quiet one" in text


# ---- tables and verdicts ---------------------------------------------------------------------------------------------


def test_a_table_has_means_over_scenes_and_differences_by_scene():
    three = {"none": [[5, 5], [4, 4, 4], [3]], "uniform_0_9": [[4, 4], [3, 3, 3], [2]], "random_0_9": [[5, 4], [3, 4, 5]]}
    found = results(**three)
    heads, *lines = tables.acceptance("main_table", found, QWEN)
    assert heads[3:] == ["accepted per round", "less `none`", "less `uniform`", "less `tree`"]
    cells = {line[0]: line for line in lines}
    assert list(cells) == ["`none`", "`random 0.9`", "`uniform 0.9`"]  # in the preset's order
    assert cells["`none`"][1:] == ["3", "1 of 10", "4.00 [3.00, 5.00]", "", "", ""]
    assert cells["`uniform 0.9`"][4:] == ["−1.00 [−1.00, −1.00]", "", ""]  # three scenes decide nothing
    assert cells["`random 0.9`"][4].startswith("−0.25 [") and cells["`random 0.9`"][5] == "+0.75 [+0.50, +1.00]"
    nine = {name: [*scenes, []][:3] * 3 for name, scenes in three.items()}  # a scene without a round counts for nothing
    many = tables.acceptance("main_table", results(**nine), QWEN)
    bold = {line[0]: line[4:] for line in many[1:]}
    assert bold["`uniform 0.9`"] == ["**−1.00 [−1.00, −1.00]**", "", ""] and bold["`random 0.9`"][1].startswith("**+0.75 [+0.")
    plain_lines = list(tables.aligned([heads, *lines]))
    assert plain_lines[0].startswith("job ") and "`" not in "".join(plain_lines) and "*" not in "".join(plain_lines)


def test_a_job_without_a_whole_round_has_no_line_and_one_scene_no_interval():
    lines = tables.acceptance("main_table", results(none=[[]], uniform_0_9=[[3, 4]]), QWEN)[1:]
    assert [line[0] for line in lines] == ["`uniform 0.9`"] and lines[0][3] == "3.50"


@pytest.mark.parametrize(
    ("low", "high", "limit", "margin", "above", "harmless"),
    [
        (0.91, 0.95, 0.9, 0.2, "supported", "supported"),
        (0.85, 0.95, 0.9, 0.2, "not decided", "supported"),
        (0.80, 0.89, 0.9, 0.2, "refuted", "supported"),
        (-0.1, 0.05, 0.0, 0.2, "not decided", "supported"),  # nothing lost, and sure enough
        (-0.3, 0.05, 0.0, 0.2, "not decided", "not decided"),  # too wide to say that nothing is lost
        (-0.1, -0.05, 0.0, 0.2, "refuted", "refuted"),  # little, but lost for certain
        (None, None, 0.0, 0.2, "not decided", "not decided"),
    ],
)
def test_a_verdict_follows_from_the_interval(low, high, limit, margin, above, harmless):
    found = Interval(0.0, low, high, 9)
    assert (findings.above(found, limit), findings.harmless(found, margin)) == (above, harmless)


def test_without_rows_nothing_is_decided():
    assert findings.above(None, 0.9) == findings.harmless(None, 0.1) == "not run"
    words = {(found.name, found.verdict) for found in findings.findings(results(uniform_0_9=[[4], [4]]), [])}
    assert words == {(f"H{number}", "not run") for number in (1, 2, 3, 4)}


def verdicts(found, tops=()):
    attention = [{"family": QWEN, "scene": f"s{n}", "top": {"0.1": top}} for n, top in enumerate(tops)]
    return {(one.name, one.measured): one.verdict for one in findings.findings(found, attention)}


def test_each_finding_can_be_supported_and_refuted():
    many = [[5, 4, 4], [4, 4, 3], [5, 5, 3], [4, 3, 3]]
    worse, same = [[a - 1 for a in each] for each in many], [[4, 5, 4], [4, 3, 4], [5, 3, 5], [3, 4, 3]]
    late = [each[::-1] for each in many]
    names = {"random_0_5": same, "two__stage_0_9": many, "none": many}
    good = verdicts(results(**names), [0.6, 0.7, 0.65, 0.6])
    bad = verdicts(results(random_0_5=worse, two__stage_0_9=worse, none=late), [0.3, 0.2, 0.25, 0.3])
    for key, word in {
        ("H1", "accepted, `random 0.5` less `none`"): ("supported", "refuted"),
        ("H2", "attention of the top 10 %"): ("supported", "refuted"),
        ("H3", "accepted, `two_stage 0.9` over `none`"): ("supported", "refuted"),
        ("H4", "`none`, first round less the mean"): ("supported", "refuted"),
        ("H1", "accepted, `random 0.25` less `none`"): ("not run", "not run"),
    }.items():
        assert (good[key], bad[key]) == word, key
    open_ones = verdicts(results(two__stage_0_9=[[5], [3], [4], [4]], none=[[5], [5], [4], [4]]), [0.45, 0.55])
    assert {open_ones[key] for key in open_ones if key[0] in ("H2", "H3", "H4") and "mass" not in key[1]} == {"not decided"}


# ---- what is committed -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [*BASES, "findings"])
def test_the_pages_say_what_the_rows_say(experiment):
    text = (ROOT / experiment / "README.md").read_text(encoding="utf-8")
    assert tables.readme(experiment, text) == text
    for picture in re.findall(r"\]\((\w+\.png)\)", text):
        assert (ROOT / experiment / picture).is_file()


def test_the_page_of_real_footage_says_what_its_rows_say(tmp_path, capsys):
    text = footage.PAGE.read_text(encoding="utf-8")
    assert footage.readme(text) == text and "56 of 56 answers identical" in text
    assert footage.main([str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"real_footage: {tmp_path} is not a results folder of python -m specvlm, and contains none\n"
    )


def test_every_committed_answer_is_the_targets_own():
    for path in (ROOT / experiment / "rows.jsonl" for experiment in BASES):
        some = [one for one in rows.read(path) if "scene" in one]
        assert some and all(one["verdict"].startswith(("identical", "numeric tie")) for one in some), path


def test_numbers_of_the_main_table_follow_from_the_rounds():
    """Computed again from the jobs' steps.jsonl, without the table's own code."""
    page, checked = (ROOT / "main_table" / "README.md").read_text(encoding="utf-8"), 0
    means = {}
    for path in sorted((ROOT / "main_table" / "steps").glob("*.jsonl.gz")):
        family, pruner = path.name.removesuffix(".jsonl.gz").split("-")
        rounds = defaultdict(list)
        for line in rounds_of(path):
            if line["round"] > 0 and line["full"]:
                rounds[line["sample"]].append(line["accepted"])
        means[family, pruner] = {sample: fmean(some) for sample, some in rounds.items()}
    for (family, pruner), by_sample in means.items():
        section = page.partition(f"### {TITLES[family]}\n")[2].partition("### ")[0]
        cells = re.search(rf"\| `{pruner}( 0\.9)?` \| (\d+) \| [^|]+ \| ([\d.]+) \[[^|]+ \| \**([^ |]*)", section)
        assert cells and (cells[2], cells[3]) == (str(len(by_sample)), f"{fmean(by_sample.values()):.2f}")
        if pruner != "none":
            less = fmean(by_sample[sample] - means[family, "none"][sample] for sample in by_sample)
            assert cells[4].replace("−", "-") == f"{less:+.2f}"
        checked += 1
    assert checked >= 3


# ---- make ablation ---------------------------------------------------------------------------------------------------


class Fork:
    """Replacement for `subprocess.Popen`: runs the same command in a fork, which has everything imported."""

    def __init__(self, command, stdout, stderr):
        assert command[:3] == [sys.executable, "-m", "specvlm"]
        self.pid, self.returncode = sweeping.start(command[3:], stdout.name), None

    def poll(self):
        done, status = os.waitpid(self.pid, os.WNOHANG) if self.returncode is None else (0, 0)
        self.returncode = os.waitstatus_to_exitcode(status) if done else self.returncode
        return self.returncode

    def terminate(self):
        assert self.poll() is not None


@pytest.mark.slow
def test_the_small_version_ends_with_table_verdicts_and_report_and_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    one = ("experiment=main_table", "drafter=tree", "pruner=none,uniform", "record=true")
    monkeypatch.setattr(small, "SWEEPS", (one,))
    torch.set_num_threads(1)  # a fork has none of the other threads
    monkeypatch.setattr(small.subprocess, "Popen", Fork)
    assert small.main(["--scenes", "2"]) == 0
    out = capfd.readouterr().out.splitlines()
    page = re.fullmatch(r"report: (.*)", out[-1])[1]
    assert "H2: a tenth" in "\n".join(out) and any(line.startswith("uniform 0.9  2 ") for line in out)
    assert (tmp_path / page).stat().st_size > 100_000
    before = {path: path.read_bytes() for path in tmp_path.rglob("samples*.jsonl")}
    assert len(before) == 4
    monkeypatch.setattr(small, "told", lambda folder: [])
    assert small.main(["--scenes", "2"]) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("samples*.jsonl")} == before
    monkeypatch.setattr(small, "SWEEPS", ((*one[:2], "pruner=nonesuch"), one))
    capfd.readouterr()
    assert small.main(["--scenes", "2"]) == 2
    assert "nonesuch" in capfd.readouterr().err


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"ablations: {tmp_path} is not a results folder of python -m specvlm, and contains none\n"
    monkeypatch.setattr(small.subprocess, "Popen", Fork)
    assert small.main(["--pair", "embeded_qwen", "--scenes", "0"]) == 2
