"""HIPPO: rank tokens by attention, change over time and local variety.

Shape suffixes: F frames, P tokens of one frame, H and W its rows and columns, O shifts to a neighbour, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.errors import UserError
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import adjacent_cosine, at_once
from specvlm.types import KeepSet

ROUNDING = 1e-6  # rounding error of a cosine in float32


@dataclass(frozen=True)
class HippoPruner(Pruner):
    """Keep the tokens of highest weighted sum of three scores, each scaled to 0..1 per frame. HIPPO (arXiv 2601.08273).

    score = w_a scale(attention) + w_n scale(novelty) + w_v scale(variety), where scale(x) = (x - min x) / (max x - min
    x) over a frame's tokens. Attention: the target's, from the text to the token. Novelty over time: 1 - cosine to the
    same cell one frame earlier (for the first frame, one frame later). Variety in space: the variance of the cosines to
    the neighbours in a square of `crop` cells, cut off at the edge of the frame. A score that is constant over a frame
    counts 0 there. Ties go to the earlier token.

    Deviations: the three scores are the paper's. Its weights were not found, so they are equal here. The scaling
    (lowest to 0, highest to 1), the novelty of the first frame and the edge of the frame are ours, too. Its parallel
    drafting and checking is not part of a pruner.

    Signals: features, verifier_attention. Cost: (crop^2 - 1) / 2 products of N D, and a sort of N. Limits: scores are
    scaled per frame, so all frames count alike, whatever the attention.

    Attributes:
        attention: Weight w_a of the attention.
        novelty: Weight w_n of the change over time.
        variety: Weight w_v of the local variety.
        crop: Side of the square of neighbours in cells: 3, 5, 7 …

    Raises:
        UserError: `crop` is even or below 3.
        ValueError: A score is NaN.
    """

    name = "hippo"
    paper = "HIPPO (arXiv 2601.08273)"
    fidelity = "adapted"
    needs = frozenset({"features", "verifier_attention"})
    attention: float = 1.0
    novelty: float = 1.0
    variety: float = 1.0
    crop: int = 3

    def __post_init__(self) -> None:
        if self.crop < 3 or self.crop % 2 == 0:
            raise UserError(f"hippo: crop must be 3, 5, 7 …, got {self.crop}")

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,), (attention_FP,) = ctx.by_frame(ctx.features.float()), ctx.by_frame(ctx.verifier_attention.float())
        x_FHWD = x_FPD.unflatten(1, (ctx.grid.height, ctx.grid.width))
        some = max(1, at_once(ctx.device) // x_FPD[0].numel())
        variety_FP = torch.cat([varieties(part, self.crop) for part in x_FHWD.split(some)]).flatten(1)
        score_FP = self.attention * scaled(attention_FP)
        score_FP = score_FP + self.novelty * scaled(novelties(x_FPD), least=ROUNDING)
        score_FP = score_FP + self.variety * scaled(variety_FP, least=ROUNDING)
        return KeepSet.top(score_FP.flatten(), ctx.budget)


def novelties(x_FPD: Tensor) -> Tensor:
    """(F, P) 1 - cosine to the same cell of the previous frame; for the first frame, of the next one."""
    change_EP = 1 - adjacent_cosine(x_FPD)
    return torch.cat([change_EP[:1], change_EP]) if len(change_EP) else x_FPD.new_zeros(x_FPD.shape[:2])


def varieties(x_FHWD: Tensor, crop: int) -> Tensor:
    """(F, H, W) variance of the cosines between a cell and its neighbours in the crop; 0 without neighbours."""
    unit_FHWD = normalize(x_FHWD, dim=-1)
    frames, height, width, _ = x_FHWD.shape
    count_HW = x_FHWD.new_zeros(height, width)
    sum_FHW, square_FHW = x_FHWD.new_zeros(2, frames, height, width)
    reach = crop // 2
    # Each pair of neighbours is compared once, and counts for both.
    shifts = [(down, right) for down in range(reach + 1) for right in range(-reach, reach + 1) if (down, right) > (0, 0)]
    for down, right in shifts:
        if down >= height or abs(right) >= width:
            continue
        here = (slice(0, height - down), slice(max(-right, 0), width - max(right, 0)))
        there = (slice(down, height), slice(max(right, 0), width - max(-right, 0)))
        cosine_FHW = (unit_FHWD[:, *here] * unit_FHWD[:, *there]).sum(-1)
        for cells in (here, there):
            count_HW[cells] += 1
            sum_FHW[:, *cells] += cosine_FHW
            square_FHW[:, *cells] += cosine_FHW.square()
    count_HW = count_HW.clamp(min=1)
    return (square_FHW / count_HW - (sum_FHW / count_HW).square()).clamp(min=0)


def scaled(score_FP: Tensor, least: float = 0.0) -> Tensor:
    """Scale each frame's scores to 0..1; all 0 if they differ by no more than `least`."""
    low_F1, high_F1 = score_FP.amin(1, keepdim=True), score_FP.amax(1, keepdim=True)
    range_F1 = high_F1 - low_F1
    flat_F1 = range_F1 <= least
    return torch.where(flat_F1, 0.0, (score_FP - low_F1) / range_F1.masked_fill(flat_F1, 1.0))


@hookimpl
def specvlm_strategies() -> list[type]:
    return [HippoPruner]
