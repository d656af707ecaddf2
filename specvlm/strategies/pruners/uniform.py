"""Keep video tokens at equal distances."""

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class UniformPruner(Pruner):
    """Keep tokens at equal distances in raster order: token floor(i (N - 1) / (B - 1)) for i = 0..B-1.

    N is the number of video tokens, B the budget. Raster order is time, row, column, over all videos. A budget of one
    keeps the first token; larger budgets keep the first and the last. This is the "uniform only" ablation of SpecVLM
    (arXiv 2508.16201): the rule of its Stage II, applied to all tokens.

    Deviations: none. Places are computed in integers: truncating a float linspace depends on the rounding of its last
    bit.

    Cost: O(B), no signal. Limits: if the stride divides the length of a row, the kept tokens form columns.
    """

    name = "uniform"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet.uniform(ctx.total, ctx.budget, ctx.device)
