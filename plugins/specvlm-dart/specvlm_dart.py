"""Keep the video tokens that duplicate a few pivots least.

Shape suffixes: N video tokens, T tokens of the text after the video, V pivots of the video, X pivots of the text, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.plugins import hookimpl
from specvlm.strategy import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class DARTPruner(Pruner):
    """DART (https://arxiv.org/abs/2502.11494): duplication matters more than importance, so no attention is read.

    Pivots are the `video_pivots` video tokens and the `text_pivots` text tokens of the largest L1 norm of the key. Of a budget
    M, the video pivots are kept, and each pivot in turn, video first, by falling norm, takes its share of the M - video_pivots
    others: of those left, the tokens of the lowest cosine between hidden states. Shares are equal; what does not divide goes to
    the first ones, so that the budget is spent. Ties go to the earlier token.

    layer: how many of the target's layers the states and keys lie behind (2: those of layer 1 counted from 0, the paper's
    K - 1 for K = 2, as FastV's); a shallower target gives its last. video_pivots, text_pivots: 4 each is our default. Adapted:
    the paper prunes the model's own layers from K on; here the target's states choose what the drafter sees from its first.

    Reads `key_norm`, `key_norm_text`, `hidden`, `hidden_text`. Costs (video_pivots + text_pivots) x N x D, and N x D for the
    norms; a loop over the pivots. Several videos of a prompt share the pivots; newline tokens are tokens like others.
    """

    name = "dart"
    needs = frozenset({"key_norm", "key_norm_text", "hidden", "hidden_text"})
    video_pivots: int = 4
    text_pivots: int = 4
    layer: int = 2

    def __post_init__(self) -> None:
        if self.video_pivots < 0 or self.text_pivots < 0 or not self.video_pivots + self.text_pivots:
            raise ValueError(
                f"dart: video_pivots={self.video_pivots}, text_pivots={self.text_pivots}: wanted at least one pivot"
            )
        if self.layer < 1:
            raise ValueError(f"layer={self.layer}: wanted 1 or more")

    def state_layer(self, layers: int) -> int:
        return min(self.layer, layers)

    def select(self, ctx: PruneContext) -> KeepSet:
        pivots_V = KeepSet.top(ctx.signal("key_norm"), min(self.video_pivots, ctx.budget)).index
        order_V = ctx.signal("key_norm")[pivots_V].sort(descending=True, stable=True).indices
        pivots_V = pivots_V[order_V]
        pivots_X = ctx.signal("key_norm_text").sort(descending=True, stable=True).indices[: self.text_pivots]
        hidden_ND, text_TD = ctx.signal("hidden"), ctx.signal("hidden_text")
        similarity = self.similarity(hidden_ND, torch.cat([hidden_ND[pivots_V], text_TD[pivots_X].to(hidden_ND)]))
        kept_N = torch.zeros(ctx.total, dtype=torch.bool, device=hidden_ND.device)
        kept_N[pivots_V] = True
        rest, count = ctx.budget - len(pivots_V), len(similarity)
        for number, near_N in enumerate(similarity):
            share = rest // count + (number < rest % count)
            left_N = near_N.masked_fill(kept_N, float("inf"))
            kept_N[left_N.sort(stable=True).indices[:share]] = True
        return KeepSet(kept_N.nonzero().flatten(), ctx.total)

    @staticmethod
    def similarity(hidden_ND: Tensor, pivots_PD: Tensor, rows: int = 4096) -> Tensor:
        """(P, N) cosines, in float32 or better, a piece of the tokens at a time."""
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        pivots_DP = normalize(pivots_PD.to(wide), dim=-1).T
        pieces = [normalize(piece.to(wide), dim=-1) @ pivots_DP for piece in hidden_ND.split(rows)]
        return torch.cat(pieces).T.contiguous()


@hookimpl
def specvlm_strategies() -> list[type]:
    return [DARTPruner]
