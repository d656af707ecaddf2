"""A memory of fixed size: when it overflows, the tokens most similar to their next one are dropped.

Symbols and shape suffixes: B budget, N video tokens of one video, K tokens in memory, J of these whose next token
changed, P tokens of one frame, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.errors import check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import cosine
from specvlm.types import KeepSet


@dataclass(frozen=True)
class StreamingPruner(Pruner):
    """Read the video in chunks into a memory of B tokens, dropping those most similar to the token after them.

    After every `chunk` frames, the tokens in memory, in raster order, of highest cosine to the next one in memory are
    dropped at once until B are left; of equal ones the later is dropped. The newest token has no next one and stays.
    This is the discarding memory of video-SALMONN S (arXiv 2510.11129), which finds discarding better than merging.

    Deviations: the paper's memory layer learns at test time, and its reader attends to the memory by the prompt. Both
    are trained, and left out.

    Signals: features. Cost: N D, and a sort of B + one chunk per chunk; only neighbours that changed are compared
    again. On a GPU the time is that of about 20 small operations per chunk: 128 frames take 8 passes with chunks of 16,
    and 128 with chunks of 1. Limits: the next token is the one to the right, so vertical repetition is not seen; tokens
    dropped early cannot return.

    Attributes:
        chunk: Frames of the token grid per chunk. The paper's chunks have 12 to 16; 1, which drops after every frame,
            is ours.

    Raises:
        UserError: `chunk` is below 1.
    """

    name = "streaming"
    paper = "video-SALMONN S (arXiv 2510.11129)"
    fidelity = "adapted"
    needs = frozenset({"features"})
    chunk: int = 16

    def __post_init__(self) -> None:
        check_range("streaming: chunk", self.chunk, 1)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        x_ND, step = ctx.features, ctx.grid.per_frame * self.chunk
        memory_K = torch.empty(0, dtype=torch.int64, device=ctx.device)
        similar_K = torch.empty(0, device=ctx.device)  # cosine to the next token in memory
        for start in range(0, ctx.total, step):
            new = torch.arange(start, min(start + step, ctx.total), device=ctx.device)
            size = len(memory_K)
            memory_K = torch.cat([memory_K, new])
            similar_K = torch.cat([similar_K, similar_K.new_empty(len(new))])
            renew(similar_K, memory_K, x_ND, torch.arange(max(size - 1, 0), len(memory_K) - 1, device=ctx.device))
            over = len(memory_K) - ctx.budget
            if over > 0:
                keep_K = similar_K.sort(stable=True).indices[: ctx.budget].sort().values
                widened_J = (keep_K[1:] - keep_K[:-1] > 1).nonzero().flatten()
                memory_K, similar_K = memory_K[keep_K], similar_K[keep_K]
                renew(similar_K, memory_K, x_ND, widened_J)
        return KeepSet(memory_K, ctx.total)


def renew(similar_K: Tensor, memory_K: Tensor, x_ND: Tensor, at_J: Tensor) -> None:
    """Update in place the similarity of the tokens at `at_J` to their next one. The last token has none: -inf."""
    similar_K[at_J] = cosine(x_ND[memory_K[at_J]], x_ND[memory_K[at_J + 1]])
    similar_K[-1] = float("-inf")


@hookimpl
def specvlm_strategies() -> list[type]:
    return [StreamingPruner]
