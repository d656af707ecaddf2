"""A plugin that is installed for the duration of a test."""

from dataclasses import dataclass

import pytest
from hydra.core.config_store import ConfigStore

from specvlm.strategies import Pruner, plugins, registry
from specvlm.strategies.plugins import Plugin


@dataclass(frozen=True)
class FramePruner(Pruner):
    """Keep whole frames."""

    name = "frame"
    first: float = 1.0

    def select(self, ctx):
        raise NotImplementedError


@pytest.fixture
def plugin(monkeypatch):
    """A plugin `specvlm-frame 0.7` with one pruner and no YAML."""
    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda: [*load(), Plugin("specvlm-frame", "0.7", (FramePruner,))])
    registry.collect.cache_clear()
    yield
    registry.collect.cache_clear()
    ConfigStore.instance().repo.get("pruner", {}).pop("frame.yaml", None)
