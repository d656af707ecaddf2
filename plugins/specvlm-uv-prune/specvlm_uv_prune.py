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
    """Keep the tokens that the target's early layers move most towards the text. UV-Prune (arXiv 2603.19610).

    UV-Prune is the pruner of ParallelVLM. With video states V_i and text states X_j after layer l of the target, the
    score sums what each early layer adds: score_i = sum_j sum_{l=1..L} [cos(V_i^l, X_j^l) - cos(V_i^{l-1}, X_j^{l-1})].
    The tokens of highest score are kept; ties go to the earlier token. No attention is read, so there is no bias
    towards the first frames.

    The sum over l telescopes, so only layers 0 and L are needed. The sum over j is one product with the mean of the
    normalized text; a mean instead of a sum does not change the order. The target's prefill provides both
    (`text_similarity`).

    Deviations: none. The paper's drafter starts while the target still prefills; so it does here with a draft on a GPU of
    its own, elsewhere it starts afterwards on the same tokens.

    Signals: text_similarity. Cost: one (N, D) tensor of the target held until its prefill ends, N x D operations there,
    and a sort of N here. Limits: the text is everything after the last video, including the chat template; several
    videos of a prompt are ranked together; newline tokens (LLaVA-OneVision) are scored like others.

    Attributes:
        layer: L, from 1 to the target's number of layers; 0 uses `depth` instead.
        depth: L as a share of the target's layers, rounded (halves to even), at least one layer. The paper does not
            publish L; a quarter is our choice for its "early layers".

    Raises:
        ValueError: A field is out of range.
        UserError: The target has fewer than `layer` layers.
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
