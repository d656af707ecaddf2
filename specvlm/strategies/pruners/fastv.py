"""Keep the video tokens the last prompt row attends to at an early layer."""

from dataclasses import dataclass
from typing import Annotated

from specvlm.errors import UserError, check_choice
from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet, Within

SOURCES = {"target": "verifier_attention_last_row", "draft": "draft_attention_last_row"}


@dataclass(frozen=True)
class FastVPruner(Pruner):
    """Keep the B tokens of highest attention from the last prompt token in layer K, counted from 1, mean over heads.

    FastV (arXiv 2403.06764): score_j = mean over heads of the attention of the last row to token j in layer K, its default
    K = 2. There the model drops its own tokens behind that layer; here the choice is made before the drafter starts. Among
    equal scores the earlier token is kept.

    layer: K, from 1. source: whose attention. target is free, a by-product of its prefill; draft is FastV's own, and
    costs K layers of the drafter over the unpruned video.

    Deviations: none.

    Cost: a sort of N. Limits: one row of one layer is a noisy guide.
    Raises UserError for a layer the model does not have or another `source`; ValueError where the attention holds NaN.
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

    def select(self, ctx: PruneContext) -> KeepSet:
        scores_LN = ctx.signal(SOURCES[self.source])
        if self.layer > len(scores_LN):
            raise UserError(f"fastv: layer={self.layer}, but the {self.source} has {len(scores_LN)} layers")
        return KeepSet.top(scores_LN[self.layer - 1], ctx.budget)
