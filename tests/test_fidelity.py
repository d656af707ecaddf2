"""Every strategy says whose method it is, and where it differs."""

import re
from pathlib import Path

import packages
import pytest

from specvlm import manual, registry
from specvlm.strategy import Drafter, Pruner, Verifier

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


def test_the_list_of_options_shows_it():
    text = manual.manual()
    for info in registry.collect()["pruner"].values():
        assert not info.cls.paper or f"[{info.plugin}; {info.cls.fidelity}: {info.cls.paper}]" in text


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cls", [cls for cls in strategies() if cls.paper], ids=lambda cls: cls.name)
def test_the_tables_of_the_readme_say_it(cls):
    built_in = cls.__module__.startswith("specvlm.")
    option = f"{cls.kind}={cls.name}" if built_in else cls.__module__.replace("_", "-")
    source = re.findall(rf"^\| `{option}` \| .* \| (.*?) \|$", README, re.M)[0]  # in the table of strategies, the first
    assert source.startswith(f"{cls.fidelity}: "), source
