"""Keep the video tokens that the question's own words attend to, thinned out layer by layer.

Shape suffixes: L layers, N video tokens, T tokens of the text after the video, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import written
from specvlm.types import KeepSet


@dataclass(frozen=True)
class SparseVLMPruner(Pruner):
    """Keep what the question's own words attend to, thinned out layer by layer. SparseVLM (arXiv 2410.04417).

    Raters: with V (N, D) and X (T, D) as they enter the target's first layer, r = mean over video tokens of softmax over
    text of V X^T; text tokens with r above its mean rate, all where none is (equal words). Score of a video token at a
    layer: the target's attention from the raters, mean over heads and raters. Stages at `layers`, counted from 0: stage i
    keeps the floor(B schedule_i / schedule_last) best of what the stage before kept, so the last keeps B. Ties go to the
    earlier token.

    layers, schedule: 2, 6, 15, and 300, 200, 110 of 576 tokens, as the released code has them. Only the ratios to the last
    count, worked out in fractions: of B = 11 the first keeps 30. A target of fewer layers gives its last for those it
    lacks.

    Deviations: the paper prunes inside the model, so that later stages attend among survivors alone; here the target sees
    everything, and its attention at all three layers is there after one prefill. The first version sets the number dropped
    in a stage by the rank of the attention matrix, and recycles dropped tokens into clusters; both are left out, as the
    released second version does.

    Reads `verifier_attention_weighted`: on the way, only (L, N) is kept. Cost: N x T x D for the raters, in pieces, and a
    sort of N a stage. Limits: several videos of a prompt are ranked together; newline tokens are tokens like others. Raises
    ValueError for a schedule that does not fit the layers or goes below its last.
    """

    name = "sparsevlm"
    paper = "SparseVLM (arXiv 2410.04417)"
    fidelity = "adapted"
    needs = frozenset({"verifier_attention_weighted"})
    layers: tuple[int, ...] = (2, 6, 15)
    schedule: tuple[float, ...] = (300.0, 200.0, 110.0)

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.schedule) or min(self.layers) < 0:
            raise ValueError(
                f"sparsevlm: layers={self.layers} and schedule={self.schedule}: wanted one share a layer from 0 on"
            )
        if not 0 < self.schedule[-1] <= min(self.schedule):
            raise ValueError(f"schedule={self.schedule}: tokens of each stage, above 0 and none below the last")

    def kept(self, budget: int) -> list[int]:
        """Tokens that each stage keeps."""
        last = written(self.schedule[-1])
        return [math.floor(budget * written(share) / last) for share in self.schedule]

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        """(T,) 1 for a rater, 0 for another word."""
        wide = torch.promote_types(text_TD.dtype, torch.float32)
        text_DT = text_TD.to(wide).T
        sums_T = torch.zeros(len(text_TD), dtype=wide, device=text_TD.device)
        for piece_ND in features_ND.split(4096):
            sums_T += (piece_ND.to(text_DT) @ text_DT).softmax(-1).sum(0)
        raters_T = sums_T > sums_T.mean()
        return torch.where(raters_T.any(), raters_T, torch.ones_like(raters_T)).to(wide)

    def select(self, ctx: PruneContext) -> KeepSet:
        scores_LN = ctx.signal("verifier_attention_weighted")
        left = torch.arange(ctx.total, device=scores_LN.device)
        for layer, count in zip(self.layers, self.kept(ctx.budget), strict=True):
            scores = scores_LN[min(layer, len(scores_LN) - 1), left]
            left = left[KeepSet.top(scores, count).index]
        return KeepSet(left, ctx.total)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [SparseVLMPruner]
