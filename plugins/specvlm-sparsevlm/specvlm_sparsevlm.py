"""Keep the video tokens that the question's own words attend to, thinned out layer by layer.

Shape suffixes: L layers, N video tokens, T tokens of the text after the video, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.plugins import hookimpl
from specvlm.strategy import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class SparseVLMPruner(Pruner):
    """SparseVLM (https://arxiv.org/abs/2410.04417): only text that has to do with the picture rates it.

    Raters: with V (N, D) and X (T, D) as they enter the target's first layer, r = mean over video tokens of softmax over text
    of V X^T; text tokens with r above its mean rate, all where none is (equal words). Score of a video token at a
    layer: the target's attention from the raters, mean over heads and raters. Stages at `layers`, counted from 0: each keeps
    the best `schedule` x budget of what the stage before kept, the last the budget.

    layers, schedule: the paper's 2, 6, 15, and its 300, 200, 110 of 576 tokens as multiples of the last. A target of fewer
    layers gives its last for those it lacks. Adapted: the paper prunes inside the model, so that later stages attend among
    survivors alone; here the target sees everything, and its attention at all three layers is there after one prefill. The
    recycling of dropped tokens into clusters, which the second version of the code dropped too, is left out, and with it the
    rank that scales the number dropped in a stage.

    Reads `verifier_attention_weighted`: on the way, only (L, N) is kept. Costs N x T x D for the raters, in pieces,
    and a sort of N a stage. Several videos of a prompt are ranked together; newline tokens are tokens like others.
    """

    name = "sparsevlm"
    needs = frozenset({"verifier_attention_weighted"})
    layers: tuple[int, ...] = (2, 6, 15)
    schedule: tuple[float, ...] = (300 / 110, 200 / 110, 1.0)

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.schedule) or min(self.layers) < 0:
            raise ValueError(
                f"sparsevlm: layers={self.layers} and schedule={self.schedule}: wanted one share a layer from 0 on"
            )
        if min(self.schedule) < 1 or self.schedule[-1] != 1:
            raise ValueError(f"schedule={self.schedule}: multiples of the budget, none below 1, the last one 1")

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
        for layer, share in zip(self.layers, self.schedule, strict=True):
            scores = scores_LN[min(layer, len(scores_LN) - 1), left]
            left = left[KeepSet.top(scores, int(ctx.budget * share)).index]
        return KeepSet(left, ctx.total)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [SparseVLMPruner]
