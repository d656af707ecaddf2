"""Drop nothing: the drafter sees the whole video."""

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class NonePruner(Pruner):
    """Keep every video token, at any ratio: the upper bound for pruners (SD-Tree in SpecVLM's paper).

    Cost: none for the choice, but the drafter prefills and attends to the full video.
    """

    name = "none"
    keeps_all = True

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet.everything(ctx.total, ctx.device)
