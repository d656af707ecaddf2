"""Everything in examples/ runs, and pages that show a file of it show its current text.

The drafter goes through its contract suite in tests/test_passes.py, as the page shows.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

from specvlm.__main__ import main
from specvlm.results.rows import rows_of, summary_of
from specvlm.strategies import plugins, registry
from specvlm.testing import check_metric, check_pruner, check_tracker, check_verifier
from specvlm.video.clips import find_clip

ROOT = Path(__file__).parents[1]
STRATEGIES = ("pruner", "drafter", "verifier", "dataset", "metric", "tracker")
ANSWER = "four objects appear on a checkered navy background."


@pytest.fixture
def example(monkeypatch):
    """Import a file of examples/ as a module for the duration of a test."""

    def load(name):
        path = ROOT / "examples" / f"{name}.py"
        spec = spec_from_file_location(f"example_{name}", path)
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def installed(example, monkeypatch):
    """Register all strategies of examples/, as if each were an installed package."""

    def point(name):
        return SimpleNamespace(name=name, load=lambda: example(name), dist=SimpleNamespace(name=f"example-{name}", version="1"))

    points = tuple(map(point, STRATEGIES))
    monkeypatch.delenv("SPECVLM_PLUGINS", raising=False)
    monkeypatch.setenv("SPECVLM_STRICT_PLUGINS", "1")
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    registry.collect.cache_clear()
    yield
    registry.collect.cache_clear()


def test_every_example_has_a_test():
    there = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert there == {*STRATEGIES, "decode", "sweep", "tiny_checkpoints"}


def test_the_pages_show_the_examples_as_they_stand():
    for name in ("drafter", "verifier", "dataset", "metric", "tracker"):
        page = (ROOT / "docs" / "write" / f"{name}.md").read_text(encoding="utf-8")
        code = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        assert re.findall(r"```python\n(.*?)```", page, re.S) == [code], name


def test_the_pruner_keeps_the_contract(example):
    check_pruner(example("pruner").CentrePruner)
    check_pruner(example("pruner").CentrePruner, height=0.0)


def test_the_verifier_keeps_the_contract(example):
    check_verifier(example("verifier").SureVerifier)


def test_the_metric_keeps_the_contract(example):
    check_metric(example("metric").WordRecallMetric)


def test_the_tracker_keeps_the_contract(example):
    check_tracker(example("tracker").LinesTracker)
    check_tracker(example("tracker").LinesTracker, rounds=True)


@pytest.mark.slow
def test_it_decodes_a_clip(example, capsys):
    answer = example("decode").decode(max_new_tokens=16)
    assert answer.startswith(ANSWER) and "accepted a round" in capsys.readouterr().out


@pytest.mark.slow
def test_all_strategies_work_together_from_the_command_line(installed, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(find_clip("synthetic_1"), videos / "one.mp4")
    (videos / "one.txt").write_text("describe the video.\n", encoding="utf-8")
    words = ["pruner=centre", "drafter=best_chain", "verifier=sure", "verifier.margin=1", "dataset=text_files"]
    job = tmp_path / "job"
    assert main([*words, f"dataset.root={videos}", "max_new_tokens=16", f"hydra.run.dir={job}", "tracker=lines"]) == 0
    (row,) = rows_of(job)
    assert (row["sample"], row["verdict"]) == ("one", "identical") and row["text"].startswith(ANSWER)
    assert row["kept_tokens"] == 102 and len(summary_of(job)["version"]) == 12
    (mirrored,) = (job / "lines").glob("*.jsonl")
    assert [*json.loads(mirrored.read_text().splitlines()[-1])] == ["exit_code"]


@pytest.mark.slow
def test_the_sweep_gives_a_figure_a_job(example, tmp_path):
    found = example("sweep").sweep(tmp_path / "sweep", scenes=1)
    assert len(found) == 2 and all(0 < accepted <= 5 for accepted in found.values())
    assert {word for job in found for word in ("uniform", "two_stage") if f"pruner={word}" in job} == {"uniform", "two_stage"}


@pytest.mark.slow
def test_the_tiny_checkpoints_are_a_target_and_a_draft_with_a_chat_template(example, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    example("tiny_checkpoints").main(str(tmp_path))
    said = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}]
    for name, layers in (("target", 3), ("draft", 2)):
        assert AutoConfig.from_pretrained(tmp_path / name).text_config.num_hidden_layers == layers
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        assert all(weight.std() > 0 for weight in model.parameters())
        text = AutoTokenizer.from_pretrained(tmp_path / name).apply_chat_template(said, tokenize=False)
        assert text == "<|im_start|>user\n<|video_pad|>\nwhat?<|im_end|>\n"
