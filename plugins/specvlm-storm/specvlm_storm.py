"""STORM's reduction over time: means of neighbouring frames, and every so many of them.

Shape suffixes: N video tokens of one video, F frames, H and W rows and columns of a frame.
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
    """Average neighbouring frames cell by cell, and take every so many of the averages. STORM (arXiv 2503.04130).

    Token (g, i) = mean over the frames f of group g of x_{f,i}, i a cell; with `spatial` above 1 also over its s x s cells.
    B / (cells of a pooled frame) groups fit the budget. Where these can hold the whole video in groups of `pool` frames
    or fewer, they do, as evenly as they can (temporal pooling); otherwise they hold `pool` frames each, at even
    distances, and what lies between is dropped (temporal stride sampling). A pooled token stands at the middle frame (and
    cell) of its group.

    Deviations: the paper's Mamba layers, which carry time into each token before it is pooled, are trained and left out; what
    is pooled are the drafter's features as they are. The paper pools 4 frames and samples with stride 2; here the budget
    says how many groups there are.

    pool: most frames of a group. spatial: s; doubled until one pooled frame fits the budget. No signal. Cost: N.
    Limits: what moves blurs; up to one pooled frame of the budget stays unspent.
    Raises UserError for fields below 1.
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
        """The frames of each group: even parts of the video, of `pool` frames at most in the middle of each."""
        parts = even_spans(frames, groups)
        trimmed = []
        for start, stop in parts:
            start += max(stop - start - self.pool, 0) // 2
            trimmed.append((start, min(stop, start + self.pool)))
        return trimmed


def blocks(height: int, width: int, side: int) -> int:
    """How many blocks of side x side cells a frame has, those cut off by its edge included."""
    return -(-height // side) * -(-width // side)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [StormPruner]
