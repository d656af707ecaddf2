"""Keep the video tokens that changed most since the previous frame."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from specvlm import KeepSet, PruneContext, Pruner, hookimpl


@dataclass(frozen=True)
class FrameDiffPruner(Pruner):
    """Rank tokens by cosine distance to the same cell one frame earlier (cf. DyCoke, arXiv 2411.15024).

    Each video of a prompt is scored on its own. Trailing newline tokens are kept last.

    Cost: one pass over the target's features. Limits: a moving camera changes every cell; slow changes are not
    detected.

    Attributes:
        first_frame: Score of the tokens of frame 0, which has no predecessor; distances lie in 0..2.
    """

    name = "frame_diff"
    needs = frozenset({"features"})
    first_frame: float = 1.0

    def select(self, ctx: PruneContext) -> KeepSet:
        changes_FP = [self.changes(x_FPD.float()) for x_FPD in ctx.by_frame(ctx.features)]
        return KeepSet.top(ctx.flatten(changes_FP), ctx.budget)

    def changes(self, x_FPD: Tensor) -> Tensor:
        """(F, P) cosine distance of each cell to itself one frame earlier."""
        first_P = torch.full_like(x_FPD[:1, :, 0], self.first_frame)
        return torch.cat([first_P, 1 - cosine_similarity(x_FPD[1:], x_FPD[:-1], dim=-1)])


@hookimpl
def specvlm_strategies() -> list[type]:
    return [FrameDiffPruner]
