"""Keep video tokens at equal distances."""

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class UniformPruner(Pruner):
    """Keep token floor(i (N - 1) / (B - 1)) for i = 0..B-1: linspace over all N tokens in raster order, cut to whole numbers.

    Raster order is time, row, column, over all videos. The first and last token are always kept; a budget of one keeps
    the first. The "uniform only" ablation of SpecVLM (arXiv 2508.16201) and its Stage II.

    Deviations: none. In whole numbers, since a float linspace cut to int depends on how its last bit was rounded.

    Cost: O(B), no signal. Limits: where the stride divides a row, the kept tokens form columns.
    """

    name = "uniform"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet.uniform(ctx.total, ctx.budget, ctx.device)
