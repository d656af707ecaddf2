"""Keep the video tokens that are least similar to a few pivots.

Symbols and shape suffixes: B budget, N video tokens, T tokens of the text after the video, V video pivots, X text
pivots, P pivots, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.errors import check_choice
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.types import KeepSet

STATES = ("normed", "raw")


@dataclass(frozen=True)
class DARTPruner(Pruner):
    """Keep the tokens that are least similar to a few pivots, without reading attention. DART (arXiv 2502.11494).

    Pivots are the V = `video_pivots` video tokens and the `text_pivots` text tokens of largest L1 norm of the key. The
    video pivots are kept. Then each pivot in turn, video first, by falling norm, takes its share of the B - V others:
    of those left, the tokens of lowest cosine between its state and theirs, after layer K = `layer` and the model's
    final norm. That norm divides a state by its length and multiplies it by a weight w, so the cosine is cos(w x, w y).
    Ties go to the earlier token.

    Deviations: the paper prunes the model's own layers from K on; here the target's states choose what the drafter sees
    from its first layer on. Exactly B tokens are kept: the shares are equal, and the remainder goes to the first
    pivots; the released code gives each floor(B / pivots) and adds the video pivots on top. The pivots are ordered by
    norm; in the code their order is that of a Python set.

    Signals: key_norm, key_norm_text, hidden, hidden_text, and final_norm for `normed`. Cost: pivots x N x D products, N
    D for the norms, and a loop over the pivots with a sort of N each. Limits: several videos of a prompt share the
    pivots; newline tokens are treated like others.

    Attributes:
        video_pivots: Number of video pivots; 4 as in copies of the released code.
        text_pivots: Number of text pivots; 4 as in copies of the released code.
        layer: K, the paper's 2. A shallower target uses its last layer.
        states: `normed` as in the released code; `raw`, ours, leaves the final norm out.

    Raises:
        ValueError: A field is out of range.
    """

    name = "dart"
    paper = "DART (arXiv 2502.11494)"
    fidelity = "adapted"
    video_pivots: int = 4
    text_pivots: int = 4
    layer: int = 2
    states: str = "normed"

    def __post_init__(self) -> None:
        if self.video_pivots < 0 or self.text_pivots < 0 or not self.video_pivots + self.text_pivots:
            raise ValueError(
                f"dart: video_pivots={self.video_pivots}, text_pivots={self.text_pivots}: expected at least one pivot"
            )
        if self.layer < 1:
            raise ValueError(f"layer={self.layer}: wanted 1 or more")
        check_choice("dart: states", self.states, STATES)

    @property
    def needs(self) -> frozenset[str]:
        read = frozenset({"key_norm", "key_norm_text", "hidden", "hidden_text"})
        return read | {"final_norm"} if self.states == "normed" else read

    def state_layer(self, layers: int) -> int:
        return min(self.layer, layers)

    def select(self, ctx: PruneContext) -> KeepSet:
        pivots_V = KeepSet.top(ctx.signal("key_norm"), min(self.video_pivots, ctx.budget)).index
        order_V = ctx.signal("key_norm")[pivots_V].sort(descending=True, stable=True).indices
        pivots_V = pivots_V[order_V]
        pivots_X = ctx.signal("key_norm_text").sort(descending=True, stable=True).indices[: self.text_pivots]
        hidden_ND, text_TD = ctx.signal("hidden"), ctx.signal("hidden_text")
        pivots_PD = torch.cat([hidden_ND[pivots_V], text_TD[pivots_X].to(hidden_ND)])
        weight_D = ctx.signal("final_norm") if self.states == "normed" else hidden_ND.new_ones(hidden_ND.shape[1])
        similarity = self.similarity(hidden_ND, pivots_PD, weight_D)
        kept_N = torch.zeros(ctx.total, dtype=torch.bool, device=hidden_ND.device)
        kept_N[pivots_V] = True
        rest, count = ctx.budget - len(pivots_V), len(similarity)
        for number, near_N in enumerate(similarity):
            share = rest // count + (number < rest % count)
            left_N = near_N.masked_fill(kept_N, float("inf"))
            kept_N[left_N.sort(stable=True).indices[:share]] = True
        return KeepSet(kept_N.nonzero().flatten(), ctx.total)

    @staticmethod
    def similarity(hidden_ND: Tensor, pivots_PD: Tensor, weight_D: Tensor, rows: int = 4096) -> Tensor:
        """(P, N) cosines of the weighted states, in float32 or wider, computed `rows` tokens at a time."""
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight_D = weight_D.to(wide)
        pivots_DP = normalize(pivots_PD.to(wide) * weight_D, dim=-1).T
        pieces = [normalize(piece.to(wide) * weight_D, dim=-1) @ pivots_DP for piece in hidden_ND.split(rows)]
        return torch.cat(pieces).T.contiguous()


@hookimpl
def specvlm_strategies() -> list[type]:
    return [DARTPruner]
