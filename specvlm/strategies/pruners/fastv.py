"""Keep the video tokens that the last prompt token attends to most in an early layer.

Shape suffixes: L layers, N video tokens.
"""

from dataclasses import dataclass
from typing import Annotated

from specvlm.errors import UserError, check_choice
from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet, Within

SOURCES = {"target": "verifier_attention_last_row", "draft": "draft_attention_last_row"}


@dataclass(frozen=True)
class FastVPruner(Pruner):
    """Keep the video tokens that the last prompt token attends to most in one layer, averaged over heads.

    FastV (arXiv 2403.06764): score_j = mean over heads of the last prompt token's attention to video token j in layer
    K, by default K = 2. The tokens with the highest scores are kept, as many as the budget allows; ties go to the
    earlier token. FastV drops the model's own tokens after that layer; here tokens are chosen before the drafter
    starts.

    Deviations: none.

    Cost: a sort of N. Limits: one row of one layer is a noisy score.

    Attributes:
        layer: The layer K, counted from 1.
        source: The model whose attention is used. `target` is free, a by-product of the target's prefill. `draft` is
            the model whose tokens are dropped, as in FastV, and costs a pass of the unpruned video through its first K
            layers.

    Raises:
        UserError: `layer` is below 1 or above the model's number of layers, or `source` is unknown.
        ValueError: The attention contains NaN.
    """

    name = "fastv"
    paper = "FastV (arXiv 2403.06764)"
    fidelity = "exact"
    layer: Annotated[int, Within(1, 1000)] = 2
    source: str = "target"

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise UserError(f"fastv: layer counts from 1, got {self.layer}")
        check_choice("fastv: source", self.source, SOURCES)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SOURCES[self.source]})

    @property
    def draft_layers(self) -> int:
        return self.layer if self.source == "draft" else 0

    def attention_layers(self, layers: int) -> int:
        return min(self.layer, layers)

    def select(self, ctx: PruneContext) -> KeepSet:
        scores_LN = ctx.signal(SOURCES[self.source])
        if self.layer > len(scores_LN):
            raise UserError(f"fastv: layer={self.layer}, but the {self.source} has {len(scores_LN)} layers")
        return KeepSet.top(scores_LN[self.layer - 1], ctx.budget)
