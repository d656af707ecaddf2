"""Keep the tokens that the vision tower attends to, and merge the rest of each frame into a few means.

Shape suffixes: N video tokens, F frames of one video, P tokens of one frame, G frames of the same budget, M dominant
and C contextual tokens of a frame, R its other tokens, D width of a key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import written
from specvlm.types import KeepSet


@dataclass(frozen=True)
class VisionZipPruner(Pruner):
    """Keep the tokens that the vision tower attends to, and means of the rest. VisionZip (arXiv 2412.04467).

    The question is ignored. Every frame gets its share of the budget. Of the k tokens kept of a frame, the M =
    floor(dominant k + 1/2), at least one, of highest attention received in the vision tower are dominant. Of the
    others, in raster order, k - M at equal strides are contextual. Every other token joins the contextual token of
    highest cosine of keys (the earlier one on a tie). Each contextual token then is the plain mean of itself and what
    joined it, at its own position. If k - M = 0, nothing is merged.

    Deviations: the layer is the last one of the tower whose output is used. The paper takes CLIP's penultimate layer,
    and the row of its class token as attention; towers without one give the mean over all rows. Both signals are pooled
    to tokens as the features are; the paper has one token per patch. The released code adds the mean of what joined to
    the contextual token, so that its scale grows; that is not repeated. The code keeps the same number of tokens of
    every frame; here the budgets of frames differ by at most one, larger ones evenly spread, and if there are fewer
    tokens than frames, some frames keep none.

    Signals: vision_attention, vision_keys (mean over heads; after rotation in Qwen2.5-VL). Cost: N x C x D for the
    cosines, at most N x P x D / 4, in two batches per video. Limits: newline tokens (LLaVA-OneVision) are kept after
    all others. Each video of a prompt has its share.

    Attributes:
        dominant: Share of a frame's kept tokens that are dominant, above 0 and at most 1. The paper has 54 of 64; the
            default of the released code is 191 of 221.

    Raises:
        ValueError: `dominant` is out of range.
    """

    name = "visionzip"
    paper = "VisionZip (arXiv 2412.04467)"
    fidelity = "adapted"
    needs = frozenset({"vision_attention", "vision_keys"})
    dominant: float = 54 / 64

    def __post_init__(self) -> None:
        if not 0 < self.dominant <= 1:
            raise ValueError(f"dominant={self.dominant} is not above 0 and at most 1")

    def select(self, ctx: PruneContext) -> KeepSet:
        parts = list(self._parts(ctx))
        root_R, member_R = torch.cat([root for root, _ in parts]), torch.cat([member for _, member in parts])
        index, row_R = root_R.unique(return_inverse=True)
        weight_R = 1.0 / row_R.bincount(minlength=len(index))[row_R].float()
        pool = torch.sparse_coo_tensor(
            torch.stack([row_R, member_R]), weight_R, (len(index), ctx.total), check_invariants=False
        ).coalesce()
        return KeepSet(index, ctx.total, pool)

    def _parts(self, ctx: PruneContext) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of token numbers (root, member). A root becomes the mean of its members, itself included."""
        cells = sum(grid.cells for grid in ctx.grids)
        room, done, start = min(ctx.budget, cells), 0, 0
        newlines = max(0, ctx.budget - cells)
        attention, keys = (ctx.by_frame(ctx.signal(name)) for name in ("vision_attention", "vision_keys"))
        for grid, attention_FP, x_FPD in zip(ctx.grids, attention, keys, strict=True):
            edges = done + torch.arange(grid.frames + 1) * grid.per_frame
            budgets_F = (edges * room // cells).diff()
            for budget in budgets_F.unique().tolist():
                frames = (budgets_F == budget).nonzero().flatten().to(ctx.device)
                if budget:
                    first_G1 = start + frames[:, None] * grid.per_frame
                    for root, member in self.frame_parts(attention_FP[frames], x_FPD[frames], budget):
                        yield (first_G1 + root).flatten(), (first_G1 + member).flatten()
            if grid.newline and newlines:
                some = start + grid.cells + torch.arange(min(grid.newline, newlines), device=ctx.device)
                newlines -= len(some)
                yield some, some
            done, start = done + grid.cells, start + len(grid)

    def frame_parts(self, attention_GP: Tensor, x_GPD: Tensor, budget: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs (root, member) within each frame: dominant tokens, then contextual ones, then those that join."""
        dominant = min(budget, max(1, math.floor(written(self.dominant) * budget + Fraction(1, 2))))
        order_GP = attention_GP.sort(dim=1, descending=True, stable=True).indices
        yield order_GP[:, :dominant], order_GP[:, :dominant]
        contextual = budget - dominant
        if not contextual:
            return
        rest_GR = order_GP[:, dominant:].sort(1).values
        count = rest_GR.shape[1]
        places = torch.arange(contextual, device=rest_GR.device) * count // contextual
        others = torch.ones(count, dtype=torch.bool, device=rest_GR.device).index_fill_(0, places, False)
        targets_GC, joining_GR = rest_GR[:, places], rest_GR[:, others]
        yield targets_GC, targets_GC
        x_GPD = normalize(x_GPD.to(torch.promote_types(x_GPD.dtype, torch.float32)), dim=-1)
        near_GRC = taken(x_GPD, joining_GR) @ taken(x_GPD, targets_GC).mT
        earlier_C = torch.arange(contextual, 0, -1, device=rest_GR.device)
        best_GR = ((near_GRC == near_GRC.amax(-1, keepdim=True)) * earlier_C).argmax(-1)
        yield targets_GC.gather(1, best_GR), joining_GR


def taken(x_GPD: Tensor, index_GR: Tensor) -> Tensor:
    """(G, R, D) the rows `index_GR` of each frame."""
    return x_GPD.gather(1, index_GR[..., None].expand(-1, -1, x_GPD.shape[2]))


@hookimpl
def specvlm_strategies() -> list[type]:
    return [VisionZipPruner]
