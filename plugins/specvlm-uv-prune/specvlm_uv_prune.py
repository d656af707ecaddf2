"""Keep the video tokens that early layers of the target move most towards the text.

Shape suffixes: N video tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from specvlm.plugins import hookimpl
from specvlm.strategy import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class UVPrunePruner(Pruner):
    """UV-Prune of ParallelVLM (https://arxiv.org/abs/2603.19610): no attention weights, hence no bias towards first frames.

    With video states V_i and text states X_j behind layer l of the target, the paper sums what each early layer adds:
    score_i = sum_j sum_{l=1..L} [cos(V_i^l, X_j^l) - cos(V_i^{l-1}, X_j^{l-1})]. The sum over l telescopes, so that layers 0
    and L are enough, and the sum over j is one product with the mean of the normalised text; the target's prefill hands over
    both (`text_similarity`). Kept are the highest scores.

    layer: L, from 1 to the target's layers; 0 takes the share `depth` of them, at least one. L is not published: a quarter is
    our choice for the paper's "early layers". The text is all that follows the last video, the chat template's words too; a
    mean over it instead of the paper's sum changes no order. A newline token (LLaVA-OneVision) is scored like any other.
    Adapted: the paper prunes while the target still prefills; here the drafter starts after it. Several videos of a prompt
    are ranked together.

    Costs one (N, D) of the target kept until its prefill ends, N x D operations there, and a sort of N here. Raises ValueError
    where the target has fewer than `layer` layers.
    """

    name = "uv_prune"
    needs = frozenset({"text_similarity"})
    layer: int = 0
    depth: float = 0.25

    def __post_init__(self) -> None:
        if self.layer < 0 or not 0 < self.depth <= 1:
            raise ValueError(f"layer={self.layer} must be 0 or more, and depth={self.depth} above 0 and at most 1")

    def state_layer(self, layers: int) -> int:
        return self.layer or max(1, round(self.depth * layers))

    def select(self, ctx: PruneContext) -> KeepSet:
        entering_N, behind_N = ctx.signal("text_similarity")
        return KeepSet.top(behind_N - entering_N, ctx.budget)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [UVPrunePruner]
