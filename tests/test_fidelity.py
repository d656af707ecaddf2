"""Every strategy names its source, and where it differs from it."""

import re
from pathlib import Path

import packages
import pytest

from specvlm.app import help as manual
from specvlm.strategies import Drafter, Pruner, Verifier, registry

FIDELITIES = {"exact", "adapted", "inspired by"}


def strategies():
    built_in = [info.cls for kind in ("pruner", "drafter", "verifier") for info in registry.collect()[kind].values()]
    packaged = [type(strategy) for kind in (Pruner, Drafter, Verifier) for strategy in packages.strategies(kind)]
    return list(dict.fromkeys([*(cls for cls in built_in if cls.__module__.startswith("specvlm.")), *packaged]))


@pytest.mark.parametrize("cls", strategies(), ids=lambda cls: cls.name)
def test_its_docstring_names_source_deviations_and_cost(cls):
    text = cls.__doc__
    assert "Cost:" in text
    if not cls.paper:
        assert not cls.fidelity
        return
    assert cls.fidelity in FIDELITIES
    assert re.search(r"arXiv \d{4}\.\d{4,5}", cls.paper) and re.search(r"\d{4}\.\d{4,5}", cls.paper).group() in text
    assert "Deviations:" in text
    assert ("Deviations: none" in text) == (cls.fidelity == "exact")


def test_the_list_of_options_shows_it(capsys):
    manual.show(["pruner"])
    text = " ".join(capsys.readouterr().out.split())
    for info in registry.collect()["pruner"].values():
        assert not info.cls.paper or f"[{info.plugin}; {info.cls.fidelity}: {info.cls.paper}]" in text


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = (ROOT / "docs" / "reference" / "packages.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cls", [cls for cls in strategies() if cls.paper], ids=lambda cls: cls.name)
def test_the_tables_say_it(cls):
    built_in = cls.__module__.startswith("specvlm.")
    option = f"{cls.kind}={cls.name}" if built_in else cls.__module__.replace("_", "-")
    source = re.findall(rf"^\| `{option}` \| .* \| (.*?) \|$", README if built_in else PACKAGES, re.M)[0]
    assert source.startswith(f"{cls.fidelity}: "), source


DEFAULTS = {  # of the papers and their code, written down once more: no comparison with loops notices a wrong one
    "two_stage": {"mass": 0.4},
    "fastv": {"layer": 2},
    "entropy_tree": {"nodes": 63, "shallow": 3, "deep": 8, "narrow": 2, "wide": 10},
    "loose": {"relaxed": 0.7, "nearest": 10},
    "memstream": {"c": 60.0, "experts": ("verifier_attention", "text_similarity"), "fusion": "reciprocal", "detrend": False},
    "holitom": {"tau": 0.8, "own": 0.6},
    "prunevid": {"tau": 0.8, "scenes": 0.25, "merge": 0.5},
    "sparsevlm": {"layers": (2, 6, 15), "schedule": (300.0, 200.0, 110.0)},
    "dart": {"layer": 2, "video_pivots": 4, "text_pivots": 4, "states": "normed"},
    "oneclip": {"clip": 10, "clips": 16, "centres": "all", "shares": "clips"},
    "flashvid": {"alpha": 0.7, "merge": 0.8, "segment": 0.9, "segments": 8, "quota": "segment", "mean": "tree"},
    "fastvid": {"segments": 8, "segment": 0.9, "d": 0.4, "p": 4, "beta": 0.6, "gather_anchors": False},
    "streaming": {"chunk": 16},
    "visionzip": {"dominant": 54 / 64},
    "metok": {"events": 5, "key_events": 3, "top_frames": 6},
    "storm": {"pool": 4},
    "vcast": {"temperature": 0.7, "least": 1},
    "forestprune": {"similarity": 0.9, "spatial": 0.8, "intra": 0.5},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_its_defaults_are_the_papers(name):
    (cls,) = [cls for cls in strategies() if cls.name == name]
    assert {field: getattr(cls(), field) for field in DEFAULTS[name]} == DEFAULTS[name]
