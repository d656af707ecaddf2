"""--help and --version list everything, within the terminal's width, before torch is imported."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from specvlm import config
from specvlm.__main__ import main
from specvlm.app import help as manual
from specvlm.config import DraftConfig, TargetConfig
from specvlm.models import families
from specvlm.strategies import registry

pytest_plugins = ["frame_plugin"]


@pytest.fixture(params=["80", "120"])
def columns(request, monkeypatch):
    """Set the terminal's width."""
    monkeypatch.setenv("COLUMNS", request.param)
    return int(request.param)


def helped(capsys, *words) -> str:
    """Return the output of --help."""
    assert main(["--help", *words]) == 0
    return capsys.readouterr().out


def entries_of(text: str) -> dict[str, str]:
    """Return names in the left column with their text: after two spaces, and on continuation lines."""
    found = re.findall(r"^ {2,4}([^ ].*?)(?: {2,}(.*(?:\n {7,}.*)*))?$", text, re.M)
    return {name: " ".join(said.split()) for name, said in found}


def test_help_fits_the_terminal(columns, capsys, plugin):
    for words in ([], ["pruner"], manual.GROUPS):
        lines = helped(capsys, *words).removeprefix(manual.INTRODUCTION).splitlines()
        assert not any("…" in line for line in lines)  # rich's sign of a cut
        lines += manual.INTRODUCTION.splitlines()
        assert max(map(len, lines)) <= columns


def test_help_lists_every_strategy_with_plugin_keys_and_summary(columns, capsys, plugin):
    whole = helped(capsys)
    for kind, infos in registry.collect().items():
        text = helped(capsys, kind)
        brief, full = entries_of(whole.partition(f"\n{kind}=NAME")[2].partition("\n\n")[0]), entries_of(text)
        names = re.findall(r"^ {2,4}([^ ]+)", text, re.M)
        for name, info in infos.items():
            source = "; ".join(filter(None, [info.plugin, info.source]))
            assert full[name] == f"{info.summary} [{source}]"
            assert info.plugin != "specvlm" or brief[name] == info.summary
            keys = names[names.index(name) + 1 :][: len(info.fields)]
            assert [key.partition("=")[0] for key in keys] == [f"{kind}.{field.name}" for field in info.fields]
        assert len(brief) == sum(info.plugin == "specvlm" for info in infos.values()) + len(
            list(config.conf_dir().glob(f"{kind}/*"))
        )
    assert "[specvlm-frame 0.7]" in entries_of(helped(capsys, "pruner"))["frame"]
    assert entries_of(helped(capsys, "pruner"))["pruner.mass=0.4"].startswith("Share of the attention that stage I retains")


def test_help_lists_every_key_and_preset(columns, capsys):
    text = helped(capsys)
    found = entries_of(text)
    sides = (("target", TargetConfig), ("draft", DraftConfig))
    own = {f"{side}.{field.name}" for side, cls in sides for field in fields(cls)}
    wanted = {*config.KEYS, *own, "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"} - {
        *config.GROUPS,
        "target",
        "draft",
    }
    names = {name.partition("=")[0] for name in found}
    assert wanted <= names and all(found[name] for name in found if name.partition("=")[0] in wanted)
    assert found["sampling"].startswith("Sample from the target's own distribution")
    assert found["ratio_by_pruner"].startswith("Acceptance and speed")
    assert (
        found["wandb"].startswith("Weights & Biases")
        and "\nhydra/launcher=NAME" in text
        and found["slurm"].endswith("[preset]")
    )
    assert "tracker.mode=online" in entries_of(helped(capsys, "tracker"))
    for path in config.conf_dir().glob("*/*.yaml"):
        assert path.stem in entries_of(helped(capsys, "preset")) and path.stem in found


def test_help_lists_every_family_and_how_to_install_those_that_are_not(columns, capsys, monkeypatch):
    monkeypatch.setattr(manual, "entry_points", lambda group: [SimpleNamespace(name="specvlm-qwen2-vl", dist=None)])
    found = entries_of(helped(capsys).partition("Model families, ")[2].partition("\n\n")[0])
    assert set(found) == {*families.specvlm_families(), *families.PACKAGES} and all(found.values())
    assert found["qwen3_vl"] == "Qwen3-VL" and found["qwen2_vl"] == "[specvlm-qwen2-vl]"
    assert found["internvl"].endswith(families.pip_line("internvl"))


@pytest.mark.parametrize("side", ["target", "draft"])
def test_help_on_a_model_shows_its_keys_alone(side, capsys):
    names = entries_of(helped(capsys, side))
    assert f"{side}.path" in names and all(name.startswith(f"{side}.") for name in names)


def test_help_on_what_there_is_not_names_what_there_is(capsys):
    assert main(["--help", "prunr"]) == 2
    assert "got 'prunr'. Did you mean \"pruner\"?" in capsys.readouterr().err
    assert helped(capsys, "pruner=two_stage") == helped(capsys, "pruner")


@pytest.mark.parametrize("words", [["--help"], ["--help", "target", "preset"], ["--version"]], ids=" ".join)
def test_it_is_there_without_torch(words):
    code = f"import sys\nfrom specvlm.__main__ import main\nmain({words})\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


COMMANDS = ["specvlm ratio=0.5", "specvlm --help pruner", "specvlm.advise ratio=0.5", "specvlm.report x", "specvlm.fit_tree x"]
COMMANDS += ["specvlm.exact_probe dtype=float32"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_shows_something_before_torch_is_imported(command, tmp_path):
    """Importing torch or Hydra ends the process here, so only earlier output appears."""
    module, *words = command.split()
    code = (
        "import runpy, sys\nsys.modules.update({'torch': None, 'hydra': None})\nsys.stderr.isatty = lambda: True\n"
        f"sys.argv[1:] = {words}\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.stderr.startswith("specvlm: loading torch and transformers …\n"), done.stderr
    assert done.returncode and ("torch" in done.stderr[43:] or "hydra" in done.stderr[43:])


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
