"""A plugin of strategies that attack what runs them. `campaign.hostile` copies it to where a third party's would be installed.

Each strategy does the honest thing but for one attack, of a mechanism that it names. HOSTILE_ONLY names those that are brought:
all of them would take every command a second.
"""

from __future__ import annotations

import os

from specvlm.strategies.plugins import hookimpl

from . import caches, data, disguises, ends, exits, guesses, inputs, models, rules, verdicts, world
from .makers import FOUND, FewScenes

__all__ = ["FOUND", "caches", "data", "disguises", "ends", "exits", "guesses", "inputs", "models", "rules", "verdicts", "world"]


@hookimpl
def specvlm_strategies() -> list[type]:
    chosen = os.environ.get("HOSTILE_ONLY", "").split(",")
    return [FewScenes, *(cls for cls in FOUND if cls.name in chosen)]
