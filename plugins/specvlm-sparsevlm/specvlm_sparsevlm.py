"""Keep the video tokens that the question's relevant words attend to, thinned out layer by layer.

Symbols and shape suffixes: B budget, L layers, N video tokens, T tokens of the text after the video, D width.
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
    """Keep what the question's relevant words attend to, thinned out layer by layer. SparseVLM (arXiv 2410.04417).

    Raters: with V (N, D) and X (T, D) as they enter the target's first layer, r = mean over video tokens of the softmax
    over text of V X^T. Text tokens with r above its mean are raters; all are if none is (equal words). The score of a
    video token in a layer is the target's attention from the raters, mean over heads and raters. Stages are at
    `layers`, counted from 0: stage i keeps the floor(B schedule_i / schedule_last) best tokens of the stage before, so
    the last keeps B. Ties go to the earlier token.

    Deviations: the paper prunes inside the model, so that later stages attend only to the tokens left; here the target
    sees everything, and one prefill gives its attention at all three layers. The first version of the paper sets the
    number dropped per stage by the rank of the attention matrix, and recycles dropped tokens into clusters; both are
    left out, as in the released second version.

    Signals: verifier_attention_weighted, of which only (L, N) is kept. Cost: N x T x D for the raters, in pieces, and a
    sort of N per stage. Limits: several videos of a prompt are ranked together; newline tokens are treated like others.

    Attributes:
        layers: Layers of the stages; 2, 6, 15 as in the released code. A target with fewer layers uses its last for the
            others.
        schedule: Tokens kept per stage; 300, 200, 110 of 576 as in the released code. Only the ratios to the last
            count, computed in fractions: of B = 11 the first stage keeps 30.

    Raises:
        ValueError: The schedule does not fit the layers, or goes below its last value.
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
                f"sparsevlm: layers={self.layers} and schedule={self.schedule}: expected one share a layer from 0 on"
            )
        if not 0 < self.schedule[-1] <= min(self.schedule):
            raise ValueError(f"schedule={self.schedule}: tokens of each stage, above 0 and none below the last")

    def kept(self, budget: int) -> list[int]:
        """Return the number of tokens that each stage keeps."""
        last = written(self.schedule[-1])
        return [math.floor(budget * written(share) / last) for share in self.schedule]

    def attention_layers(self, layers: int) -> int:
        return min(max(self.layers) + 1, layers)

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        """(T,) 1 for raters, 0 for other text tokens."""
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
