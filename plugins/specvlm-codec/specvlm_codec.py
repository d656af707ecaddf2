"""Keep what moves, as the compressed stream already tells.

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
    """Keep what moves in the compressed stream, with budgets by its bytes. Inspired by CoPE-VideoLM (arXiv 2602.13191).

    A cell's saliency is the length of its motion vectors less the frame's median vector (the camera's), added up since the
    sampled frame before. Each frame's share of the budget goes by what `share` names, at most its moving cells, or all of
    its cells where it stands for a frame that refers to no other; only what is left then goes to still cells. Inside a
    frame the cells of the highest saliency are kept, and of equal ones, as in frames without vectors, some spread over the
    frame.

    share: "bytes", compressed bytes of the frames it stands for, which a cut or a key frame has many of (our default);
    "motion", their saliency in sum; "even".

    Deviations: of CoPE-VideoLM only the idea is taken, that the codec's motion tells what is new. It shows a frame that
    refers to others as a few tokens of encoders trained on motion vectors and residuals; nothing here is trained, residuals
    are not read, and the shares and the saliency are ours.

    Signals: motion, packet_bytes, intra. Cost: the file is decoded once more, up to the last sampled frame, and a sort of P
    a frame. Limits: a file that gives no motion (no file, all-intra coding, a codec whose decoder exports no vectors: HEVC,
    VP9, AV1) is pruned evenly over all its tokens, as `KeepSet.note` says in one line. Blocks of moving things that the
    coder wrote anew have no vector and count as still. Vectors count as coded, also where their reference is several frames
    away. Videos of a prompt share the budget by their tokens; newline tokens (LLaVA-OneVision) are kept last. Raises
    ValueError for another share.
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
        """Why there is none; empty where there is some."""
        if motion_FP.numel() and bool((motion_FP > 0).any()):
            return ""
        if not bool((size_FP > 0).any()):
            return "the video comes from no file that PyAV can read"
        if bool((intra_FP >= 1).all()):
            return "every frame of the file is coded by itself"
        return "nothing moves, or the decoder of the file's codec exports no motion vectors"


def shares(weights_F: Tensor, room: int, most_F: Tensor) -> Tensor:
    """(F,) whole numbers on the CPU, in proportion to the weights (even for zero ones), none above its `most_F`.

    They add up to `room` where there is so much room. What one frame cannot take, the others share. Largest remainders are
    rounded up, the earlier frame on a tie.
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
    """(F, P) place of each cell in its frame, the highest first; equal ones in an order whose every beginning is spread out."""
    count = motion_FP.shape[1]
    spread_P = (torch.arange(count, dtype=torch.float64) * GOLDEN % 1).sort(stable=True).indices.to(motion_FP.device)
    order_FP = spread_P[motion_FP[:, spread_P].sort(dim=1, descending=True, stable=True).indices]
    places_P = torch.arange(count, device=motion_FP.device)
    return torch.empty_like(order_FP).scatter_(1, order_FP, places_P.expand_as(order_FP))


@hookimpl
def specvlm_strategies() -> list[type]:
    return [CodecPruner]
