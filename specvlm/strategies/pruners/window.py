"""Keep one contiguous block of video tokens."""

from dataclasses import dataclass

import torch

from specvlm.errors import check_choice
from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet

PLACES = ("front", "middle", "back")


@dataclass(frozen=True)
class WindowPruner(Pruner):
    """Keep B neighbouring tokens in raster order, at the front, in the middle or at the back of the video.

    B is the budget, and N the number of tokens of all videos. The first one kept is token 0 (front), floor((N - B) / 2)
    (middle) or N - B (back). These are the window baselines of SpecVLM (arXiv 2508.16201, Fig. 7a): all of one section
    of the video, nothing of the rest.

    Deviations: the paper does not say how to round the start of the middle block; it is rounded down here.

    Cost: O(B), no signal.

    Attributes:
        where: `front`, `middle` or `back`.

    Raises:
        UserError: `where` is none of these.
    """

    name = "window"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "adapted"
    where: str = "middle"

    def __post_init__(self) -> None:
        check_choice("window: where", self.where, PLACES)

    def select(self, ctx: PruneContext) -> KeepSet:
        start = {"front": 0, "middle": (ctx.total - ctx.budget) // 2, "back": ctx.total - ctx.budget}[self.where]
        return KeepSet(torch.arange(start, start + ctx.budget, device=ctx.device), ctx.total)
