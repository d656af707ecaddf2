"""STORM's reduction over time: average neighbouring frames, and sample the averages evenly.

Symbols and shape suffixes: B budget, N video tokens of one video, F frames, H and W rows and columns of a frame.
"""

from dataclasses import dataclass

import torch

from specvlm.errors import check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import block_of, even_spans
from specvlm.types import KeepSet


@dataclass(frozen=True)
class StormPruner(Pruner):
    """Average neighbouring frames cell by cell, and keep evenly spaced averages. STORM (arXiv 2503.04130).

    Token (g, i) = mean over the frames f of group g of x_{f,i}, where i is a cell; with `spatial` above 1 also over
    blocks of s x s cells. The budget holds B / (cells of a pooled frame) groups. If these can cover the whole video
    with at most `pool` frames each, they do, as evenly as possible (temporal pooling). Otherwise they have `pool`
    frames each, evenly spaced, and the frames between are dropped (temporal stride sampling). A pooled token is placed
    at the middle frame (and cell) of its group.

    Deviations: the paper's Mamba layers, which carry time into each token before it is pooled, are trained, and left
    out; the drafter's features are pooled as they are. The paper pools 4 frames and samples with stride 2; here the
    budget sets the number of groups.

    Signals: none. Cost: N. Limits: moving objects blur; up to one pooled frame of the budget stays unspent.

    Attributes:
        pool: Most frames per group.
        spatial: Side s of the pooled blocks in cells; doubled until one pooled frame fits the budget.

    Raises:
        UserError: A field is below 1.
    """

    name = "storm"
    paper = "STORM (arXiv 2503.04130)"
    fidelity = "inspired by"
    pool: int = 4
    spatial: int = 1

    def __post_init__(self) -> None:
        check_range("storm: pool", self.pool, 1)
        check_range("storm: spatial", self.spatial, 1)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        grid, side = ctx.grid, self.spatial
        while blocks(grid.height, grid.width, side) > ctx.budget:
            side *= 2
        groups = min(grid.frames, ctx.budget // blocks(grid.height, grid.width, side))
        middle_P = block_of(grid.height, grid.width, side, ctx.device)
        owner_FP = torch.full((grid.frames, grid.per_frame), -1, device=ctx.device)
        for start, stop in self.windows(grid.frames, groups):
            owner_FP[start:stop] = (start + stop - 1) // 2 * grid.per_frame + middle_P
        here_N = torch.arange(ctx.total, device=ctx.device)
        return KeepSet.merge(owner_FP.flatten(), here_N, torch.ones_like(here_N), ctx.total)

    def windows(self, frames: int, groups: int) -> list[tuple[int, int]]:
        """Return the frames of each group: at most `pool` frames in the middle of each even part of the video."""
        parts = even_spans(frames, groups)
        trimmed = []
        for start, stop in parts:
            start += max(stop - start - self.pool, 0) // 2
            trimmed.append((start, min(stop, start + self.pool)))
        return trimmed


def blocks(height: int, width: int, side: int) -> int:
    """Number of side x side blocks in a frame, including those cut off by its edge."""
    return -(-height // side) * -(-width // side)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [StormPruner]
