"""The README says what is there: every strategy, every key of summary.json, the plugin as it stands, commands that compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specvlm import compose, registry
from specvlm.config import model_folder
from specvlm.data.clips import find_clip
from specvlm.metrics import KEYS
from specvlm.strategy import SIGNALS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
DATASETS = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")


def test_every_built_in_strategy_has_a_row():
    for kind, infos in registry.collect().items():
        for name, info in infos.items():
            assert info.plugin != "specvlm" or f"| `{kind}={name}` |" in README, f"{kind}={name}"


def test_every_data_set_says_where_its_files_go_and_what_its_keys_are():
    for name, info in registry.collect()["dataset"].items():
        if info.plugin == "specvlm":
            assert f"| `dataset={name}` |" in DATASETS and f"python -m specvlm dataset={name} " in DATASETS, name
            for field in info.fields:
                assert f"dataset.{field.name}=" in DATASETS or name == "synthetic", f"{name}.{field.name}"


def test_every_key_of_the_summary_and_every_signal_is_explained_in_its_own_words():
    for key, meaning in KEYS.items():
        assert f"| `{key}` | {meaning} |" in RESULTS, key
    for signal in SIGNALS:
        assert f"`{signal}`" in README, signal


def test_the_package_shown_is_the_one_that_ships():
    for language, file in (("python", "specvlm_frame_diff.py"), ("toml", "pyproject.toml")):
        shipped = (ROOT / "plugins/specvlm-frame-diff" / file).read_text(encoding="utf-8")
        assert f"```{language}\n{shipped}```" in README, file


@pytest.mark.slow
def test_the_python_example_prints_the_answer(capsys):
    code = re.search(r"```python\n(from specvlm import DecodingGraph.*?)```", README, re.S)[1]
    for model, name in (("32B", "target"), ("7B", "plain")):
        code = code.replace(f"/models/Qwen2.5-VL-{model}-Instruct", str(model_folder(f"embedded:qwen2_5_vl/{name}")))
    for there, here in (
        ('"talk.mp4", frames=128', f'"{find_clip("synthetic_1")}", fps=2'),
        (", max_pixels=200704", ""),
        ("cuda", "cpu"),
        ("What is shown?", "how many objects appear?"),
    ):
        assert there in code
        code = code.replace(there, here)
    exec(code, {})
    assert capsys.readouterr().out.strip() == "four objects appear on a checkered navy background."


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in (README + DATASETS).splitlines() if line.startswith("python -m specvlm ")])
def test_the_commands_compose(line):
    words = shlex.split(line.split("  #")[0].rstrip("\\"))[3:]
    if "--help" in words:
        return
    if any(word.startswith("hydra/launcher=") for word in words):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the launchers extra")
    sweep = "-m" in words
    assert compose.jobs(compose.quoted([w for w in words if w != "-m"], sweep), sweep)
