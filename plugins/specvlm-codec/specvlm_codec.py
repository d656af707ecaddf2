"""Keep what moves, by the motion vectors and packet sizes of the compressed stream.

Shape suffixes: N video tokens, F frames of one video, P tokens of one frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.types import KeepSet

SHARES = ("bytes", "motion", "even")
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class CodecPruner(Pruner):
    """Keep what moves, by the motion vectors and packet sizes of the file. Inspired by CoPE-VideoLM (arXiv 2602.13191).

    The saliency of a cell is the length of its motion vectors, less the frame's median vector (the camera's), summed
    since the previous sampled frame. Each frame's share of the budget follows `share`, and is at most its moving cells,
    or all its cells if it covers a frame that refers to no other. Only what is left goes to still cells. Within a frame
    the cells of highest saliency are kept; ties, and frames without vectors, are spread over the frame.

    Deviations: from CoPE-VideoLM it takes only the idea that the codec's motion tells what is new. The paper shows a
    frame that refers to others as a few tokens, from encoders trained on motion vectors and residuals. Here nothing is
    trained, residuals are not read, and shares and saliency are ours.

    Signals: motion, packet_bytes, intra. Cost: the file is decoded once more, up to the last sampled frame, and a sort
    of P per frame. Limits: a video without motion (no file, all-intra coding, or a codec whose decoder exports no
    vectors: HEVC, VP9, AV1) is pruned evenly over all its tokens, and `KeepSet.note` says so. Moving blocks that are
    intra-coded have no vector and count as still. Vectors count at full length, even if their reference is several
    frames away. Videos of a prompt share the budget in proportion to their tokens; newline tokens (LLaVA-OneVision) are
    kept last.

    Attributes:
        share: What splits the budget among frames: `bytes` (ours, the default), the compressed bytes of the frames it
            covers, which are many at cuts and key frames; `motion`, their total saliency; or `even`.

    Raises:
        ValueError: `share` is none of these.
    """

    name = "codec"
    paper = "CoPE-VideoLM (arXiv 2602.13191)"
    fidelity = "inspired by"
    needs = frozenset({"motion", "packet_bytes", "intra"})
    share: str = "bytes"

    def __post_init__(self) -> None:
        if self.share not in SHARES:
            raise ValueError(f"share={self.share!r} is none of {', '.join(SHARES)}")

    def select(self, ctx: PruneContext) -> KeepSet:
        motion, size, intra = (ctx.by_frame(ctx.signal(name)) for name in ("motion", "packet_bytes", "intra"))
        reasons = [self._no_motion(*signals) for signals in zip(motion, size, intra, strict=True)]
        if all(reasons):
            note = f"codec: no motion to prune by ({reasons[0]}): tokens are kept evenly"
            return replace(KeepSet.uniform(ctx.total, ctx.budget, ctx.device), note=note)
        cells, done, kept = sum(grid.cells for grid in ctx.grids), 0, []
        room, newlines = min(ctx.budget, cells), max(0, ctx.budget - cells)
        for number, (grid, reason) in enumerate(zip(ctx.grids, reasons, strict=True)):
            count = (done + grid.cells) * room // cells - done * room // cells
            by = "even" if reason else self.share
            weights_F = {"bytes": size[number][:, 0], "motion": motion[number].sum(1), "even": torch.ones(grid.frames)}[by]
            all_F = torch.full((grid.frames,), grid.per_frame)
            new_F = torch.where(intra[number][:, 0] > 0, all_F.to(ctx.device), (motion[number] > 0).sum(1)).cpu()
            budgets_F = shares(weights_F, count, all_F if reason else new_F)
            budgets_F = budgets_F + shares(weights_F, count - int(budgets_F.sum()), all_F - budgets_F)
            kept.append((ranks_of(motion[number]) < budgets_F.to(ctx.device)[:, None]).flatten())
            kept.append(torch.arange(grid.newline, device=ctx.device) < newlines)
            newlines, done = max(0, newlines - grid.newline), done + grid.cells
        lacking = [f"video {number} ({reason})" for number, reason in enumerate(reasons, start=1) if reason]
        note = f"codec: no motion in {', '.join(lacking)}: kept evenly there" if lacking else ""
        return KeepSet(torch.cat(kept).nonzero().flatten(), ctx.total, note=note)

    @staticmethod
    def _no_motion(motion_FP: Tensor, size_FP: Tensor, intra_FP: Tensor) -> str:
        """Say why a video has no motion; empty if it has some."""
        if motion_FP.numel() and bool((motion_FP > 0).any()):
            return ""
        if not bool((size_FP > 0).any()):
            return "the video comes from no file that PyAV can read"
        if bool((intra_FP >= 1).all()):
            return "every frame of the file is coded by itself"
        return "nothing moves, or the decoder of the file's codec exports no motion vectors"


def shares(weights_F: Tensor, room: int, most_F: Tensor) -> Tensor:
    """Split `room` into (F,) whole numbers on the CPU, in proportion to the weights (evenly if all are 0).

    None exceeds its `most_F`; the excess goes to the other frames. They add up to `room`, or to the sum of `most_F` if
    that is less. The largest remainders are rounded up; ties go to the earlier frame.
    """
    weights_F, most_F = weights_F.double().cpu(), most_F.cpu()
    out_F, open_F = torch.zeros_like(most_F), most_F > 0
    while room and bool(open_F.any()):
        mine_F = torch.where(open_F, weights_F, 0.0)
        mine_F = mine_F if mine_F.sum() > 0 else open_F.double()
        quota_F = room * mine_F / mine_F.sum()
        full_F = open_F & (quota_F >= most_F)
        if not bool(full_F.any()):
            out_F += quota_F.long()
            rest_F = torch.where(open_F, quota_F - quota_F.floor(), -1.0)
            room -= int(quota_F.long().sum())
            out_F[rest_F.sort(descending=True, stable=True).indices[:room]] += 1
            break
        out_F[full_F] = most_F[full_F]
        room, open_F = room - int(most_F[full_F].sum()), open_F & ~full_F
    return out_F


def ranks_of(motion_FP: Tensor) -> Tensor:
    """(F, P) rank of each cell in its frame, highest motion first. Any first cells of equal ones are spread out."""
    count = motion_FP.shape[1]
    spread_P = (torch.arange(count, dtype=torch.float64) * GOLDEN % 1).sort(stable=True).indices.to(motion_FP.device)
    order_FP = spread_P[motion_FP[:, spread_P].sort(dim=1, descending=True, stable=True).indices]
    places_P = torch.arange(count, device=motion_FP.device)
    return torch.empty_like(order_FP).scatter_(1, order_FP, places_P.expand_as(order_FP))


@hookimpl
def specvlm_strategies() -> list[type]:
    return [CodecPruner]
