"""The configuration and the command line: what is accepted, what is refused, and the exit codes."""

import errno
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from frame_plugin import FramePruner
from omegaconf import OmegaConf

from specvlm import config
from specvlm.__main__ import main
from specvlm.app import compose
from specvlm.app.quoting import quoted
from specvlm.errors import UserError
from specvlm.strategies import registry

pytest_plugins = ["frame_plugin"]


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Replace decoding by recording what would run, in an empty working directory."""
    calls = []

    def run(cfg, folder):
        outcome = behaviour.get(cfg.pruner.name, behaviour["*"])
        if isinstance(outcome, BaseException):
            raise outcome
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
        calls.append((cfg, folder))
        return outcome

    behaviour = {"*": 0}
    fake = ModuleType("specvlm.app.run")
    fake.run = run
    monkeypatch.setitem(sys.modules, "specvlm.app.run", fake)
    monkeypatch.chdir(tmp_path)
    run.calls, run.behaviour = calls, behaviour
    return run


def written():
    return sorted(str(path) for path in Path().rglob("*"))


# The configuration itself


def test_every_key_has_a_type_a_default_and_a_comment():
    raw = OmegaConf.load(config.conf_dir() / "config.yaml")
    defaults = set(raw) - {"defaults", "hydra"}
    assert defaults == set(config.KEYS) - set(config.GROUPS)
    for line in (config.conf_dir() / "config.yaml").read_text().splitlines():
        if line.strip().split(":")[0] in defaults - {"target", "draft"} | {"weights"}:
            assert "# " in line, line


def test_defaults_are_the_main_job():
    cfg = compose.compose()
    assert (cfg.pruner.name, cfg.drafter.name, cfg.verifier.name, cfg.ratio) == ("two_stage", "tree", "greedy", 0.9)
    assert cfg.target.path.startswith("embedded:") and cfg.dtype == "float32" and cfg.baseline is True


PRESETS = [f"{group}={path.stem}" for group in ("pair", "experiment") for path in (config.conf_dir() / group).glob("*.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "experiment=ratio_by_pruner"])
def test_every_preset_composes(preset):
    """The 28 jobs of ratio_by_pruner are composed and counted below."""
    own = ["dataset.root=a"] if preset == "experiment=real_footage" else []
    assert compose.jobs([preset, "target.path=a", "draft.path=b", *own], sweep=True)


@pytest.mark.slow
def test_a_preset_that_is_a_sweep_says_so_and_the_command_line_wins_over_it(ran, capsys):
    assert len(compose.jobs(["experiment=ratio_by_pruner"], sweep=True)) == 28
    fewer = compose.jobs(["experiment=ratio_by_pruner", "ratio=0.5", "pruner=none", "dataset.scenes=3"], sweep=True)
    assert [(job.cfg.pruner.name, job.cfg.ratio, job.cfg.dataset.scenes) for job in fewer] == [("none", 0.5, 3)]
    for words, why in ((["experiment=frames"], "it needs -m"), (["-m", "experiment=frames,positions"], "give it alone")):
        assert main(words) == 2
        assert f"experiment=frames is a sweep, over frames, pruner: {why}" in capsys.readouterr().err


@cache
def usual_ratio() -> float:
    return compose.compose().ratio


@pytest.mark.parametrize("pair", [path.stem for path in sorted((config.conf_dir() / "pair").glob("*.yaml"))])
def test_a_pair_of_released_checkpoints_takes_their_folders(pair):
    cfg = compose.compose([f"pair={pair}", "target.path=/a", "draft.path=/b"])
    assert (cfg.target.path, cfg.draft.path) == ("/a", "/b") and cfg.ratio == usual_ratio()
    assert "embedded" in pair or cfg.drafter.name == "tree"


def test_presets_add_to_the_defaults():
    sampling = compose.compose(["experiment=sampling"]).verifier
    assert (sampling.name, sampling.temperature, sampling.top_k) == ("sampling", 0.7, 0)
    aware, plain = (compose.compose([f"pair=embedded_qwen2_5_vl{kind}"]) for kind in ("_aware", ""))
    assert aware.target == plain.target and aware.dtype == plain.dtype and aware.draft.path != plain.draft.path


def test_no_preset_has_a_registered_name():
    for kind, infos in registry.collect().items():
        assert not {path.stem for path in (config.conf_dir() / kind).glob("*.yaml")} & set(infos)


def test_command_line_wins_over_preset():
    assert compose.compose(["pair=embedded_llava_onevision", "dtype=bfloat16"]).dtype == "bfloat16"


def test_plugin_without_yaml_is_an_option_with_its_fields(plugin):
    cfg = compose.compose(["pruner=frame", "pruner.first=0.5"])
    assert registry.build("pruner", cfg.pruner) == FramePruner(first=0.5)
    with pytest.raises(UserError, match="pruner.first=abc: expected float"):
        compose.compose(["pruner=frame", "pruner.first=abc"])


def test_a_preset_of_ones_own_builds_on_a_registered_strategy(tmp_path):
    (tmp_path / "pruner").mkdir()
    (tmp_path / "pruner" / "mine.yaml").write_text("defaults: [two_stage]\nmass: 0.2\n")
    (job,) = compose.jobs(["pruner=mine", "pruner.spread=frame"], sweep=False, folder=tmp_path)
    assert (job.cfg.pruner.name, job.cfg.pruner.mass, job.cfg.pruner.spread) == ("two_stage", 0.2, "frame")
    with pytest.raises(UserError, match=r"pruner.mass=\[1\]: expected float"):
        compose.jobs(["pruner=mine", "pruner.mass=[1]"], sweep=False, folder=tmp_path)
    with pytest.raises(UserError, match="mass must be above 0 and at most 1, or auto, got 'abc'"):
        compose.jobs(["pruner=mine", "pruner.mass=abc"], sweep=False, folder=tmp_path)


def test_embedded_models_are_folders_of_the_package():
    assert config.model_folder("embedded:a/b") == Path(config.__file__).parent / "assets" / "a" / "b"
    assert config.model_folder("/models/x") == Path("/models/x")


TEXTS = ["what, and why?", "it's (a) [b] {c}: d=e", 'say "hi"', "back\\slash\\", "100 % of $5", "\\'", "ünï çödé 视频"]


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_question_and_paths_are_taken_literally(text):
    words = [f"question={text}", f"video={text}", f"target.path={text}"]
    cfg = compose.compose(quoted(words, sweep=False))
    assert (cfg.question, cfg.video, cfg.target.path) == (text, text, text)


@pytest.mark.slow
def test_a_folder_to_write_to_is_one_whatever_is_in_its_name(ran, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    for folder in ("it's, really (b)", "a,b", "~/c d"):
        assert main([f"hydra.run.dir={folder}"]) == main(["-m", "pruner=none,uniform", f"hydra.sweep.dir={folder}"]) == 0
        above = Path(folder).expanduser().absolute()
        assert {ran.calls.pop()[1].parent for _ in range(2)} == {above} and ran.calls.pop()[1] == above
    words = ["baselines=~/b", "dataset=folder", "dataset.root=~/v"]
    assert quoted(words, sweep=True) == [
        f"baselines={Path.cwd()}/home/b",
        words[1],
        f"dataset.root={Path.cwd()}/home/v",
    ]


def test_quoted_leaves_hydras_own_syntax_alone():
    words = ["question=null", "question='a, b'", "question=choice(a,b)", "ratio=0.1,0.2", "video=", "-m", "drafter.shape=paper"]
    assert quoted(words, sweep=False) == words
    assert quoted(["video=a.mp4,b.mp4"], sweep=True) == ["video=a.mp4,b.mp4"]


def test_a_tree_can_be_given_as_a_list():
    assert compose.compose(quoted(["drafter.shape=[[0],[1],[0,0]]"], sweep=False)).drafter.shape == "[[0],[1],[0,0]]"


# What is refused, with one line and code 2


REFUSED = [
    ("pruner=two_stge", 'there is no pruner "two_stge"; choose from fastv, none, .*window. Did you mean "two_stage"?'),
    ("prunner=x", 'there is no key "prunner".*Did you mean "pruner"?'),
    ("max_new_token=3", 'there is no key "max_new_token".*Did you mean "max_new_tokens"?'),
    ("+max_new_token=3", 'there is no key "max_new_token".*Did you mean "max_new_tokens"?'),
    ("mass=0.3", 'Did you mean "pruner.mass"?'),
    ("pruner.mas=0.3", 'there is no key "pruner.mas"; pruner "two_stage" has mass, spread. Did you mean "pruner.mass"?'),
    ("pruner=none pruner.mass=0.3", 'pruner "none" has no keys'),
    ("pruner.name=none", 'pruner=none has no key "mass"'),
    ("pair=embeded_qwen2_5_vl", 'Did you mean "embedded_qwen2_5_vl"?'),
    ("experiment=samplin", 'Did you mean "sampling"?'),
    ("target.pth=x", 'Did you mean "target.path"?'),
    ("ratio=abc", "ratio=abc: expected float"),
    ("ratio=null", "ratio=null: expected float"),
    ("frames=1.5", r"frames=1.5: expected int \| None"),
    ("baseline=maybe", "baseline=maybe: expected bool"),
    ("pruner.mass=[1]", "pruner.mass=.*expected float"),
    ("target=abc", "target=abc"),
    ("ratio=[1", r'cannot read "ratio=\[1"'),
    ("ratio", 'cannot read "ratio"'),
    ("=3", "."),
    ("ratio=-0.1", "ratio=-0.1: expected a share .* from 0 to 1"),
    ("ratio=1.5", "ratio=1.5: expected a share .* from 0 to 1"),
    ("ratio=nan", "ratio=nan: expected a share .* from 0 to 1"),
    ("max_new_tokens=0", "max_new_tokens=0: expected at least 1"),
    ("seed=-1", "seed=-1"),
    ("frames=0", "frames=0: expected at least 1, or null"),
    ("fps=0", "fps=0.0: expected more than 0, or null"),
    ("device=gpu", "device=gpu: expected auto, cpu, cuda"),
    ("engine=graph", 'engine=graph: expected one of auto, eager, graphs. Did you mean "graphs"?'),
    ("draft.weights=int3", "draft.weights=int3: expected one of null, bf16, fp8, int8, int4"),
    ("dtype=flaot32", 'expected one of auto, .*Did you mean "float32"?'),
    ("positions=orignal", 'expected one of original, reindexed. Did you mean "original"?'),
    ("mrope=x", "expected one of hf, reference"),
    ("reader=cv2", "expected one of auto, pyav, decord"),
    ("video=", "video=: expected a file or the name of an embedded clip"),
    ("~ratio", "ratio has no value"),
    ("~pruner", "pruner has no value"),
    ("ratio=${nope}", "Interpolation key 'nope' not found"),
    ("pair=qwen2_5_vl_32b_7b", "target.path has no value"),
    ("drafter.shape=nonsense", "drafter=tree: tree shape 'nonsense' is none of"),
    ("ratio=0.5,0.9", "several values are a sweep, which needs -m"),
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--config-dir nowhere", "--config-dir nowhere: no such folder"),
    ("-m pruner=none,unifrm", 'there is no pruner "unifrm"'),
    ("-m pruner=none ratio=0.5,1.9", "ratio=1.9"),
    ("-m pruner=none,two_stage pruner.mass=0.2", 'pruner "none" has no keys'),
    ("-m ratio=[1", r'cannot read "ratio=\[1"'),
    ("-m pruner=glob(zz*)", "nothing matches"),
    ("-m ratio=interval(0,1)", "needs a sampling sweeper"),
    ("hydra.run.dir=", "hydra.run.dir= names no folder"),
    ("-m pruner=none hydra.sweep.dir=", "hydra.sweep.dir= names no folder"),
    ("hydra.sweep.dir=x", "give hydra.run.dir=FOLDER"),
    ("-m pruner=none hydra.run.dir=x", "give hydra.sweep.dir=FOLDER"),
    ("-p hydra", "--package needs --cfg job, hydra or all"),
    ("--resolve ratio=0.5", "--resolve needs --cfg job, hydra or all"),
    ("--cfg job pruner=nope", 'there is no pruner "nope"'),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "why"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_input_ends_with_one_line_and_code_2_and_nothing_written(line, why, ran, capsys):
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("specvlm: ")
    assert re.search(why, err), err
    assert not ran.calls and written() == []


def test_full_error_shows_the_traceback(ran, capsys, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(["ratio=abc"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


# What runs


def test_run_writes_into_the_dated_folder_or_where_it_is_told(ran):
    assert main(["pruner=none"]) == 0 and main(["hydra.run.dir=x/../a, b/c"]) == 0
    folders = [folder.relative_to(Path.cwd()) for _, folder in ran.calls]
    assert folders[0].parts[0] == "outputs" and len(folders[0].parts) == 3
    assert folders[1] == Path("a, b/c")
    assert [path.name for path in folders[1].iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_sweep_makes_a_folder_a_job(ran, capsys):
    assert main(shlex.split("-m pruner=two_stage,uniform,random ratio=0.5,0.9")) == 0
    assert [(cfg.pruner.name, cfg.ratio) for cfg, _ in ran.calls][:3] == [
        ("two_stage", 0.5),
        ("two_stage", 0.9),
        ("uniform", 0.5),
    ]
    assert len({folder for _, folder in ran.calls}) == 6
    assert ran.calls[3][1].name == "3_pruner=uniform,ratio=0.9"
    assert "[6/6] pruner=random ratio=0.9" in capsys.readouterr().out


@pytest.mark.slow
def test_sweep_over_questions_gives_each_its_folder(ran):
    assert main(["-m", "question=choice('a, b','c/d')"]) == 0
    assert [cfg.question for cfg, _ in ran.calls] == ["a, b", "c/d"]
    assert len({folder for _, folder in ran.calls}) == 2


@pytest.mark.slow
def test_sweep_over_all_pruners_has_the_plugins_too(ran, plugin):
    assert main(["-m", "pruner=glob(*)"]) == 0
    assert {cfg.pruner.name for cfg, _ in ran.calls} == set(registry.collect()["pruner"])


@pytest.mark.slow
def test_a_failing_job_does_not_lose_the_others_and_the_worst_code_counts(ran, capsys):
    """1, a mismatch, is worse than an error."""
    ran.behaviour |= {"uniform": UserError("no such file"), "random": 1}
    assert main(["-m", "pruner=uniform,random,none"]) == 1
    assert [cfg.pruner.name for cfg, _ in ran.calls] == ["random", "none"]
    assert capsys.readouterr().err == "specvlm: no such file\n"
    assert not any("uniform" in path for path in written())
    assert main(["-m", "pruner=uniform,none"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("line", ["pruner=none", "-m pruner=none,random", "hydra.run.dir=a/b"])
@pytest.mark.parametrize("error", [UserError("no such file: x"), OSError(errno.ENOSPC, "No space left on device", "x")])
def test_mistake_during_the_run_leaves_no_folder(line, error, ran, capsys):
    ran.behaviour["*"] = error
    assert main(shlex.split(line)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert set(lines) == {f"specvlm: {error}"}
    assert written() == []


def test_folder_that_was_there_before_stays(ran):
    Path("mine").mkdir()
    ran.behaviour["*"] = UserError("x")
    assert main(["hydra.run.dir=mine"]) == 2
    assert written() == ["mine"]


@pytest.mark.slow
def test_run_folder_that_cannot_be_made_is_one_line(ran, capsys):
    Path("file").write_text("")
    for line in ("hydra.run.dir=file/x", "-m hydra.sweep.dir=file/x"):
        assert main(line.split()) == 2
        assert capsys.readouterr().err.startswith("specvlm: [Errno ")
    assert written() == ["file"]


def test_full_disk_while_the_sweep_is_set_up_leaves_nothing(ran, capsys, monkeypatch):
    def save(config, path):
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(OmegaConf, "save", save)
    assert main(["-m", "pruner=none"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert written() == []


@pytest.mark.slow
def test_interrupt_is_one_line_and_code_130(ran, capsys):
    ran.behaviour["*"] = KeyboardInterrupt()
    assert main(["-m", "pruner=none,random"]) == 130
    assert capsys.readouterr().err == "specvlm: interrupted\n"
    assert written() == []


def test_a_fault_of_ours_shows_its_traceback_and_code_3(ran, capsys):
    ran.behaviour["*"] = RuntimeError("boom")
    assert main([]) == 3
    assert "RuntimeError: boom" in capsys.readouterr().err
