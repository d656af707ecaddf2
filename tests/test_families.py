"""Model families as a kind of plugin: found by `model_type`, imported late, and named in errors and baselines' keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.errors import UserError
from specvlm.models import families, plugins
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.load import family_of
from specvlm.models.plugins import PluginError, hookimpl
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.testing import tiny as tiny_models
from specvlm.testing.tiny import VIDEO
from specvlm.types import GenerationOptions, TokenGrid


class Later(Qwen2_5_VL):
    """A family of a plugin."""

    family = "later_vl"
    version = "7"


class Unfinished(VideoLM):
    family = "unfinished_vl"
    axes = 1


HERE = "test_families"


@pytest.fixture
def bringing(monkeypatch):
    """Install one plugin for each dict of families."""
    monkeypatch.delenv("SPECVLM_PLUGINS", raising=False)

    def install(*brought):
        points = []
        for number, found in enumerate(brought):
            module = ModuleType(f"specvlm_{number}")
            module.specvlm_families = hookimpl(lambda found=found: found)
            module.specvlm_families.__name__ = "specvlm_families"
            dist = SimpleNamespace(name=f"specvlm-{number}", version="0.3")
            points.append(SimpleNamespace(name=dist.name, load=lambda module=module: module, dist=dist))
        monkeypatch.setattr(plugins, "entry_points", lambda group: points)
        families.sources.cache_clear()

    yield install
    families.sources.cache_clear()


def test_built_in_families_come_through_the_hook():
    assert plugins.families_of(families) == families.specvlm_families()
    assert {"qwen2_5_vl", "llava_onevision", "qwen3_vl"} <= set(families.specvlm_families())
    assert families.find("qwen2_5_vl") is Qwen2_5_VL and families.find("llava_onevision") is LlavaOneVision
    assert all(families.find(name).family == name for name in families.specvlm_families())


@pytest.mark.slow
def test_a_family_is_imported_when_a_checkpoint_of_its_type_is_loaded():
    code = """
import sys
from specvlm.models import families, load
def there(word): return sorted(name for name in sys.modules if word in name)
assert not there("specvlm.models.qwen") and not there(".modeling_qwen2_5_vl"), there("qwen")
families.find("qwen2_5_vl")
assert there("specvlm.models.qwen2_5_vl") and not there("specvlm.models.llava") and not there(".modeling_qwen2_5_vl")
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_a_plugin_brings_a_family(bringing):
    bringing({"later_vl": f"{HERE}:Later"})
    assert families.find("later_vl").__name__ == "Later"
    assert families.sources()["later_vl"].plugin == "specvlm-0 0.3"


def test_an_unknown_type_names_what_exists_and_a_package_that_brings_it(bringing):
    bringing()
    with pytest.raises(UserError, match=r"^x: model type 'qwen2_vll' is not .* llava_onevision, qwen2_5_vl, .*Did you mean"):
        family_of(Path("x"), SimpleNamespace(model_type="qwen2_vll"))
    with pytest.raises(UserError, match=r"'internvl' is not supported; .*: pip install ./plugins/specvlm-internvl$"):
        families.find("internvl")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("no_such_module:Later", "cannot be imported: ModuleNotFoundError"),
        (f"{HERE}:Missing", "cannot be imported: AttributeError"),
        (f"{HERE}:HERE", "is not a class derived from specvlm.models.video_lm.VideoLM"),
        (f"{HERE}:Unfinished", "does not define check_settings, encode_image, encode_video, .*hf_inputs"),
        (f"{HERE}:Later", "has family = 'later_vl', but is registered as 'broken_vl'"),
    ],
)
def test_a_broken_family_is_explained_when_it_is_needed(bringing, place, said):
    bringing({"broken_vl": place})
    assert families.find("qwen2_5_vl") is Qwen2_5_VL
    with pytest.raises(PluginError, match=f"^specvlm-0 0.3: .*{said}"):
        families.find("broken_vl")


def test_of_two_families_of_one_type_the_built_in_or_the_first_stays(bringing, caplog):
    bringing({"qwen2_5_vl": f"{HERE}:Later"}, {"later_vl": f"{HERE}:Later"}, {"later_vl": "elsewhere:Later"})
    assert families.sources()["qwen2_5_vl"].plugin == "specvlm" and families.find("qwen2_5_vl") is Qwen2_5_VL
    assert families.sources()["later_vl"].plugin == "specvlm-1 0.3"
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in said] == [
        'specvlm: plugin specvlm-0 0.3 defines model family "qwen2_5_vl"',
        'specvlm: plugin specvlm-2 0.3 defines model family "later_vl"',
    ]


class Ragged(Qwen2_5_VL):
    """Frames of unequal lengths: the grid is one row of tokens, and the video knows the runs."""

    def runs(self, grid, video):
        return video["runs"]


def test_runs_may_depend_on_the_video():
    lm, videos = Ragged(tiny_models.model("qwen2_5_vl").hf), [{"runs": [3, 1, 2]}, {"runs": [2, 2]}]
    grids = [TokenGrid(1, 1, sum(video["runs"])) for video in videos]
    prompt = lm.expand([1, *(VIDEO, 2) * 3, 3, *(VIDEO, 4) * 2], grids, videos)
    kinds = "".join("v" if token == VIDEO else "t" for token in prompt.tokens.tolist())
    assert kinds == "t" + "vvvt" + "vt" + "vvt" + "t" + "vvt" * 2


def test_the_hook_must_return_places_by_type():
    for wrong in ([Later], {"later_vl": Later}):
        module = ModuleType("wrong")
        module.specvlm_families = hookimpl(lambda wrong=wrong: wrong)
        module.specvlm_families.__name__ = "specvlm_families"
        with pytest.raises(PluginError, match=r'must return a dict \{model_type: "module:Class"\}'):
            plugins.families_of(module)


def test_the_version_of_a_family_names_its_code(monkeypatch):
    assert families.version_of(Later).startswith("later_vl 7 ")
    found = {families.version_of(cls) for cls in (Later, Qwen2_5_VL, LlavaOneVision)}
    assert len({version.split()[-1] for version in found}) == 3, "the hash is of the files of its classes"


def test_no_file_outside_a_familys_own_asks_for_a_family():
    names = "|".join(families.specvlm_families())
    words = rf"(family|model_type) (==|!=|in|not in) .*[\"']({names})|isinstance\([^)]*(Qwen|Llava)"
    found = subprocess.run(
        ["git", "grep", "-nE", words, "--", "specvlm/*.py"], cwd=Path(__file__).parents[1], capture_output=True
    )
    assert [line for line in found.stdout.decode().splitlines() if not line.startswith("specvlm/models/families.py")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", families.specvlm_families())
def test_every_built_in_family_has_a_tiny_model_to_check_drafters_on(name):
    target, prompt = tiny_models.model(name), tiny_models.prompt(name)
    assert type(target) is families.find(name) and target.dtype == torch.float64
    alone = tokens_of(list(autoregressive(target, prompt, 20, GreedyVerifier())))
    graph = DecodingGraph(target, tiny_models.noisy(name), UniformPruner(), TreeDrafter(), GreedyVerifier())
    assert tokens_of(list(graph.decode(prompt, GenerationOptions(20, 0.5)))) == alone
