"""Drop nothing: the drafter sees the whole video."""

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class NonePruner(Pruner):
    """Keep every video token, whatever the ratio: the upper bound that pruners are compared with (SD-Tree in SpecVLM).

    Cost: none for the choice, but the drafter prefills and attends to the full video.
    """

    name = "none"
    keeps_all = True

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet.everything(ctx.total, ctx.device)
