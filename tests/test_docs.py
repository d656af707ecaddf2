"""README and docs/ match the code: strategies, keys, signals, the example plugin, commands that compose, links."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from docs import generate
from specvlm.app import compose
from specvlm.app.quoting import quoted
from specvlm.config import model_folder
from specvlm.models.family import Family
from specvlm.results.metrics import KEYS, TOTALS
from specvlm.strategies import SIGNALS, registry
from specvlm.testing import check_pruner
from specvlm.video.clips import find_clip

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}


def page(name):
    return PAGES[ROOT / name]


README = page("README.md")
STRATEGIES, SUMMARY = page("docs/reference/strategies.md"), page("docs/reference/summary.md")
DATASETS, PRUNER, OWN_PAIR = page("docs/guides/datasets.md"), page("docs/write/pruner.md"), page("docs/guides/own_pair.md")
OWN_PAGES = {"dataset": DATASETS, "metric": page("docs/guides/metrics.md"), "tracker": page("docs/guides/sweeps.md")}
FENCES = re.compile(r"^```.*?^```$", re.M | re.S)


def test_every_built_in_strategy_has_a_row():
    for kind, infos in registry.collect().items():
        for name, info in infos.items():
            if info.plugin == "specvlm":
                assert f"| `{kind}={name}` |" in STRATEGIES, f"{kind}={name}"
                assert f"| `{kind}={name}` |" in OWN_PAGES.get(kind, README), f"{kind}={name}"


def test_every_data_set_says_where_its_files_go_and_what_its_keys_are():
    for name, info in registry.collect()["dataset"].items():
        if info.plugin == "specvlm":
            assert f"| `dataset={name}` |" in DATASETS and f"python -m specvlm dataset={name} " in DATASETS, name
            for field in info.fields:
                assert f"dataset.{field.name}=" in DATASETS or name == "synthetic", f"{name}.{field.name}"


def test_every_key_of_the_summary_and_every_signal_is_explained_in_its_own_words():
    for key, meaning in (*KEYS.items(), *TOTALS.items()):
        assert f"| `{key}` | {meaning} |" in SUMMARY, key
    for signal, meaning in SIGNALS.items():
        assert f"`{signal}`" in PRUNER, signal
        assert f"| `{signal}` | {meaning} |" in page("docs/reference/signals.md"), signal


@pytest.mark.slow
def test_the_generated_pages_are_current():
    for path, text in generate.pages().items():
        assert PAGES[path] == text, f"{path.name}: run `python -m docs.generate`"


@pytest.mark.parametrize(("name", "of"), [("specvlm-frame-diff", "pruner"), ("specvlm-internvl", "family")])
def test_the_package_shown_is_the_one_that_ships(name, of):
    for language, file in (("python", f"{name.replace('-', '_')}.py"), ("toml", "pyproject.toml")):
        shipped = (ROOT / "plugins" / name / file).read_text(encoding="utf-8")
        assert f"```{language}\n{shipped}```" in page(f"docs/write/{of}.md"), file


def test_the_parts_shown_of_a_second_family_are_those_that_ship():
    shipped = (ROOT / "plugins" / "specvlm-video-llama-3" / "specvlm_video_llama_3.py").read_text(encoding="utf-8")
    parts = re.findall(r"```python\n(.*?)```", page("docs/write/family.md"), re.S)[1:]
    assert len(parts) == 5 and all(bare(part) in bare(shipped) for part in parts)


def bare(code):
    """Return the lines of code without their indentation: a page shows methods without their class."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def test_every_method_of_a_family_is_in_the_table_of_its_page():
    rows = "\n".join(line for line in page("docs/write/family.md").splitlines() if line.startswith("| `"))
    names = {name for name in (*vars(Family), *Family.__annotations__) if not name.startswith("_")}
    given = {"hf", "tokenizer", "folder"}  # not for a family to define
    assert {name for name in names - given if f"`{name}" not in rows} == set()
    required = {
        name
        for line in rows.splitlines()
        if "| required |" in line
        for name in re.findall(r"`(\w+)(?:\(|`)", line.split("|")[1])
    }
    assert required == {"family", "axes", *Family.__abstractmethods__}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_prose_are_short(path):
    prose = FENCES.sub("", PAGES[path])
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))] == []


def anchors(text):
    """List the anchors that a forge and mkdocs make from headings."""
    heads = re.findall(r"^#+ (.*)$", FENCES.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
    text = FENCES.sub("", path.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]*))?\)", text):
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.slow
def test_the_python_of_the_readme_prints_the_answer(capsys):
    (code,) = re.findall(r"```python\n(import specvlm\n.*?)```", README, re.S)
    exec(code, {})
    assert capsys.readouterr().out.strip() == "four objects appear on a checkered navy background."


def test_the_pruner_of_the_readme_keeps_the_contract(monkeypatch):
    (code,) = re.findall(r"```python\n(from dataclasses import.*?)```", README, re.S)
    module = ModuleType("specvlm_loudest")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, module.__dict__)
    (cls,) = module.specvlm_strategies()
    check_pruner(cls)


@pytest.mark.slow
def test_the_python_of_the_guide_prints_the_answer(capsys):
    code = re.search(r"```python\n(from specvlm import DecodingGraph.*?)```", OWN_PAIR, re.S)[1]
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


COMMANDS = [
    line
    for path, text in PAGES.items()
    for line in text.splitlines()
    if line.startswith("python -m specvlm ") and path.name != "tutorial.md"  # which has a test of its own
]


@pytest.mark.slow
@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS))
def test_the_commands_compose(line):
    words = shlex.split(line.split("  #")[0].rstrip("\\"))[3:]
    if "--help" in words:
        return
    if any(word.startswith("hydra/launcher=") for word in words):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the launchers extra")
    sweep = "-m" in words
    assert compose.jobs(quoted([w for w in words if w != "-m"], sweep), sweep)
