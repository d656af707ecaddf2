"""Keep the video tokens closest to the centre of their frame."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm import KeepSet, PruneContext, Pruner, TokenGrid, hookimpl


@dataclass(frozen=True)
class CentrePruner(Pruner):
    """Keep the tokens closest to the centre of their frame, in all frames alike.

    height: weight of vertical distance, relative to horizontal distance.

    Cost: negligible; reads no signal. Limits: drops everything that happens at the border.
    """

    name = "centre"
    needs = frozenset()
    height: float = 1.0

    def __post_init__(self) -> None:
        if self.height < 0:
            raise ValueError(f"height must be at least 0, got {self.height}")

    def select(self, ctx: PruneContext) -> KeepSet:
        scores_FP = [-self.distance(grid).expand(grid.frames, -1) for grid in ctx.grids]
        return KeepSet.top(ctx.flatten(scores_FP).to(ctx.device), ctx.budget)

    def distance(self, grid: TokenGrid) -> Tensor:
        """(P,) squared distance of each cell to the centre of the frame."""
        rows_H = torch.linspace(-1, 1, grid.height) if grid.height > 1 else torch.zeros(1)
        columns_W = torch.linspace(-1, 1, grid.width) if grid.width > 1 else torch.zeros(1)
        return (self.height * rows_H[:, None] ** 2 + columns_W**2).flatten()


@hookimpl
def specvlm_strategies() -> list[type]:
    return [CentrePruner]


if __name__ == "__main__":
    from decode import decode

    decode(pruner=CentrePruner())
