"""LVC: pool every segment to one frame, weighting frames by the question's attention.

Symbols and shape suffixes: B budget, N video tokens of one video, F frames, P tokens of one frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import even_spans
from specvlm.types import KeepSet


@dataclass(frozen=True)
class LvcPruner(Pruner):
    """Pool every segment of the video, cell by cell, to one frame weighted by the question. LVC (arXiv 2504.06835).

    The video is split into ceil(B / P) even segments. Token (g, i) = sum over the frames f of segment g of w_f x_{f,i}
    with w_f = a_f^(1/T) / sum over the segment, where a_f is the target's attention to frame f. This is the softmax of
    log a_f / T. A pooled frame takes the place of its heaviest frame (the earlier one on a tie). If the budget does not
    hold all pooled frames whole, the one of least attention (of equals the last) is thinned out evenly.

    Deviations: the paper takes the softmax of query times frame feature; a target has no encoder that maps both into
    one space, so its attention replaces the product. The layer that the paper tunes after the compression is left out.
    The number of segments follows from the budget.

    Signals: verifier_attention. Cost: N. Limits: moving objects blur within a segment.

    Attributes:
        temperature: T, above 0. 1 weights by attention, values near 0 take the best frame, large ones the plain mean.
            The paper's value was not found.

    Raises:
        UserError: The temperature is not positive.
        ValueError: The attention is NaN or negative.
    """

    name = "lvc"
    paper = "LVC (arXiv 2504.06835)"
    fidelity = "adapted"
    needs = frozenset({"verifier_attention"})
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"lvc: temperature must be above 0, got {self.temperature}")

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (attention_FP,) = ctx.by_frame(ctx.verifier_attention.double())
        frames, per_frame = attention_FP.shape
        mass_F = attention_FP.sum(1)
        if not bool((mass_F >= 0).all()):
            raise ValueError(f"lvc weights frames by attention, but one has {mass_F.min().item()}")
        wanted = -(-ctx.budget // per_frame)
        segments = even_spans(frames, wanted)
        masses = mass_F.tolist()
        least = min(reversed(range(wanted)), key=lambda g: sum(masses[slice(*segments[g])]))
        thin = KeepSet.uniform(per_frame, ctx.budget - (wanted - 1) * per_frame, ctx.device).index

        place_P = torch.arange(per_frame, device=ctx.device)
        owner_FP = torch.full((frames, per_frame), -1, device=ctx.device)
        weight_FP = attention_FP.new_empty(frames, per_frame)
        for number, (start, stop) in enumerate(segments):
            cells_P = thin if number == least else place_P
            owner_FP[start:stop, cells_P] = (start + mass_F[start:stop].argmax()) * per_frame + cells_P
            weight_FP[start:stop] = weights(mass_F[start:stop], self.temperature)[:, None]
        return KeepSet.merge(owner_FP.flatten(), torch.arange(ctx.total, device=ctx.device), weight_FP.flatten(), ctx.total)


def weights(mass_F: Tensor, temperature: float) -> Tensor:
    """(F,) softmax of log mass / temperature; equal weights if there is no attention at all."""
    peak = mass_F.max()
    share_F = torch.where(peak > 0, mass_F / peak.clamp(min=torch.finfo(mass_F.dtype).tiny), 1.0) ** (1 / temperature)
    return share_F / share_F.sum()


@hookimpl
def specvlm_strategies() -> list[type]:
    return [LvcPruner]
