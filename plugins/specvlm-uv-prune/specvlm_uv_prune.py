"""Keep the video tokens that early layers of the target move most towards the text.

Shape suffixes: N video tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import written
from specvlm.types import KeepSet


@dataclass(frozen=True)
class UVPrunePruner(Pruner):
    """Keep what early layers of the target move towards the text. UV-Prune of ParallelVLM (arXiv 2603.19610).

    With video states V_i and text states X_j behind layer l of the target, the score is what each early layer adds: score_i
    = sum_j sum_{l=1..L} [cos(V_i^l, X_j^l) - cos(V_i^{l-1}, X_j^{l-1})]. The highest are kept, of equals the earlier. No
    attention is read, hence no bias towards first frames.

    The sum over l telescopes, so that layers 0 and L are enough, and the sum over j is one product with the mean of the
    normalised text, a mean instead of a sum, which changes no order; the target's prefill hands over both
    (`text_similarity`).

    layer: L, from 1 to the target's layers; 0 takes the share `depth` of them, to the nearest whole number (a half to the
    even one), at least one. L is not published: a quarter is our choice for the paper's "early layers".

    Deviations: none. The paper's drafter starts while the target still prefills; here it starts after it, on the same
    tokens.

    Signals: text_similarity. Cost: one (N, D) of the target kept until its prefill ends, N x D operations there, and a sort
    of N here. Limits: the text is all that follows the last video, the chat template's words too; several videos of a
    prompt are ranked together; a newline token (LLaVA-OneVision) is scored like any other. Raises ValueError for fields out
    of range, UserError where the target has fewer than `layer` layers.
    """

    name = "uv_prune"
    paper = "ParallelVLM (arXiv 2603.19610)"
    fidelity = "exact"
    needs = frozenset({"text_similarity"})
    layer: int = 0
    depth: float = 0.25

    def __post_init__(self) -> None:
        if self.layer < 0 or not 0 < self.depth <= 1:
            raise ValueError(f"layer={self.layer} must be 0 or more, and depth={self.depth} above 0 and at most 1")

    def state_layer(self, layers: int) -> int:
        return self.layer or max(1, round(written(self.depth) * layers))

    def select(self, ctx: PruneContext) -> KeepSet:
        entering_N, behind_N = ctx.signal("text_similarity")
        return KeepSet.top(behind_N - entering_N, ctx.budget)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [UVPrunePruner]
