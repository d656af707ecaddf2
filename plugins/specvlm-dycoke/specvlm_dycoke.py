"""DyCoke's merging over time: keep one of four frames whole, and of the others the cells that changed.

Shape suffixes: F frames, R frames that are not anchors, P tokens of one frame, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import apportion, cosine, spread
from specvlm.types import KeepSet

GROUP = 4
REFERENCE = (0, 0, 0, 2)  # frame that each frame of a group is compared to; frame 0 is the anchor


@dataclass(frozen=True)
class DyCokePruner(Pruner):
    """Keep the first of every four frames whole, and of the others the cells least similar to a reference frame.

    Temporal merging of DyCoke (arXiv 2411.15024): in a group of four, frames 1 and 2 are compared to frame 0, and frame
    3 to frame 2, cell by cell, by cosine. Each of these frames keeps the same number of its least similar cells. The
    paper's k = 0.7 keeps 30 % of them, 47.5 % of all tokens; here the budget sets the number.

    Deviations: a budget below one frame in four, which no k gives, is spent only on those first frames, by the same
    rule among themselves (so that one in sixteen is whole), and so on; a single frame that is still too large is
    sampled evenly. The paper's other half, a KV cache that changes while decoding, is left out: a drafter's context
    stays as it is. Tokens keep their raster order, and a last group of fewer than four frames is treated alike; the
    released code orders tokens by similarity, loses a last odd frame and fails on four frames.

    Signals: features. Cost: N D. Limits: a cell is compared only to the same cell, so a moving camera defeats it; a
    tenth of the tokens shows a quarter of the frames.
    """

    name = "dycoke"
    paper = "DyCoke (arXiv 2411.15024)"
    fidelity = "adapted"
    needs = frozenset({"features"})

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,) = ctx.by_frame(ctx.features)
        kept_FP = torch.zeros(x_FPD.shape[:2], dtype=torch.bool, device=ctx.device)
        frame_F = torch.arange(len(x_FPD), device=ctx.device)
        while ctx.budget < len(frame_F[::GROUP]) * x_FPD.shape[1] and len(frame_F) > 1:
            frame_F = frame_F[::GROUP]
        if len(frame_F) == 1:
            kept_FP[frame_F[0], spread(x_FPD.shape[1], min(ctx.budget, x_FPD.shape[1]), ctx.device)] = True
        else:
            kept_FP[frame_F] = merged(x_FPD[frame_F], ctx.budget)
        return KeepSet(kept_FP.flatten().nonzero().flatten(), ctx.total)


def merged(x_FPD: Tensor, budget: int) -> Tensor:
    """(F, P) bool: all cells of the anchors, and other cells up to the budget."""
    frames, per_frame, _ = x_FPD.shape
    frame_F = torch.arange(frames, device=x_FPD.device)
    rest_R = frame_F[frame_F % GROUP != 0]
    kept_FP = (frame_F % GROUP == 0)[:, None].repeat(1, per_frame)
    reference_R = rest_R - rest_R % GROUP + torch.tensor(REFERENCE, device=x_FPD.device)[rest_R % GROUP]
    similar_RP = cosine(x_FPD[rest_R], x_FPD[reference_R])
    count_R = apportion(budget - int(kept_FP.sum()), torch.full_like(rest_R, per_frame))
    place_RP = similar_RP.sort(dim=1, stable=True).indices.argsort(dim=1)
    kept_FP[rest_R] = place_RP < count_R[:, None]
    return kept_FP


@hookimpl
def specvlm_strategies() -> list[type]:
    return [DyCokePruner]
