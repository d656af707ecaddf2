"""SpecVLM's own pruner: what the target attends to, and an even sample of the rest.

Shape suffixes: N video tokens, R leftovers of stage I, F frames, P tokens of one frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from specvlm.errors import UserError, check_choice, did_you_mean
from specvlm.strategies import PruneContext, Pruner
from specvlm.toolkit.segments import written
from specvlm.types import KeepSet, TokenGrid, Within

SPREADS = ("linspace", "frame")
PAPER, AUTO = 0.4, "auto"
PART = 8  # under AUTO stage I has at most an eighth of the budget
MASS = f"above 0 and at most 1, or {AUTO}"


@dataclass(frozen=True)
class TwoStagePruner(Pruner):
    """Keep the few tokens that hold most of the target's attention, and spend the left-over budget evenly.

    SpecVLM's pruner (arXiv 2508.16201), for a budget B = floor(N (1 - ratio)). Stage I: the smallest set I with
    sum_{j in I} a_j >= mass * sum_j a_j, highest a_j first (among equals the earlier token), cut to B; a_j is the mean
    attention of the text after the video. Stage II: of the R = N - |I| leftovers in raster order, the k = B - |I| at
    floor(i (R - 1) / (k - 1)), i = 0..k-1; a single one is the first.

    mass: share of the attention that stage I retains, above 0 and at most 1, or auto. 0.4 is the released code's; a
    reproduction reports 0.5 for Qwen2.5-VL. `auto`, ours, is 0.4 with stage I cut to floor(B / 8) instead of B, so that seven
    eighths of the budget are left to stage II, however far the attention spreads.
    spread: how stage II spreads. `linspace` is the paper's one-dimensional stride over time, rows and columns.
    `frame`, ours, gives every frame the same number of stage II tokens, within one, the surplus going to frames that stage I
    left poorest, and spreads them in two dimensions inside each frame (an ordered-dither pattern, moved from frame to
    frame); it reaches every frame as soon as k is at least the number of frames that stage I left empty.

    Deviations: none. All is counted exactly: of 480 tokens a ratio of 0.9 leaves 48, where the released code's floats leave 47.

    Cost: two sorts of N, three small reads by the host; the signal comes out of the target's prefill.
    Limits: without any attention stage I is empty, and the result is that of `uniform` (spread=linspace).
    Raises UserError for fields out of range; ValueError where the attention is NaN, infinite or negative.
    """

    name = "two_stage"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"
    needs = frozenset({"verifier_attention"})
    mass: Annotated[float | str, Within(0, 1, MASS, above=True)] = PAPER
    spread: str = "linspace"

    def __post_init__(self) -> None:
        if self.mass != AUTO and (isinstance(self.mass, str) or not 0 < self.mass <= 1):
            raise UserError(f"two_stage: mass must be {MASS}, got {self.mass!r}.{did_you_mean(str(self.mass), [AUTO])}")
        check_choice("two_stage: spread", self.spread, SPREADS)

    def select(self, ctx: PruneContext) -> KeepSet:
        scores_N = ctx.verifier_attention
        order_N = scores_N.sort(descending=True, stable=True).indices
        first = order_N[: self.stage_one(scores_N[order_N], ctx.budget)]
        taken_N = torch.zeros_like(scores_N, dtype=torch.bool)
        taken_N[first] = True
        left_R, spare = (~taken_N).nonzero().flatten(), ctx.budget - len(first)
        if self.spread == "linspace":
            second = left_R[KeepSet.uniform(len(left_R), spare, left_R.device).index]
        else:
            second = left_R[by_frame(ctx.grids, taken_N)[:spare]]
        return KeepSet(torch.cat([first, second]).sort().values, ctx.total)

    def stage_one(self, descending_N: Tensor, budget: int) -> int:
        """How many tokens stage I takes of scores in descending order."""
        if isinstance(self.mass, str):
            return min(retained(descending_N, PAPER), budget // PART)
        return min(retained(descending_N, self.mass), budget)


def retained(descending_N: Tensor, mass: float) -> int:
    """Length of the smallest prefix that sums to at least `mass` of the total.

    Summed as whole multiples of a power of two near the highest score / 2^47 (for 16k tokens), and compared as
    fractions. So a tie is a tie, 0.07 of 100 is 7, and no device's order of summation can move the answer; float sums
    have none of that, and CUDA refuses their cumsum under deterministic algorithms.
    """
    peak, low = torch.stack([descending_N[0], descending_N[-1]]).tolist()
    if not 0 <= low <= peak < math.inf:  # NaN sorts first, and compares false
        raise ValueError(f"attention must be finite and not negative, got values from {low} to {peak}")
    count = len(descending_N)
    unit = 2.0 ** (math.frexp(peak)[1] - 62 + count.bit_length())
    units_N = (descending_N.double() / unit).round().long()
    sums_N = units_N.cumsum(0)
    enough = math.ceil(written(mass) * int(sums_N[-1]))
    return int((sums_N - units_N < enough).sum())


def by_frame(grids: Sequence[TokenGrid], taken_N: Tensor) -> Tensor:
    """Order in which `spread=frame` takes the leftovers (R,): one of each frame a turn, newline tokens after all others."""
    device, frames = taken_N.device, sum(grid.frames for grid in grids)
    frame_N, place_N = layout(grids, device)
    # Within a turn: frames that stage I left poorest first, and among equals such as lie far apart in time.
    poor_F = torch.bincount(frame_N[taken_N], minlength=frames)[:frames]
    time_F = torch.arange(frames, device=device)
    seat_F = dither(time_F, torch.zeros_like(time_F), frames, 1)
    rank_F = (poor_F * (seat_F.max() + 1) + seat_F).argsort().argsort()

    left_R = (~taken_N).nonzero().flatten()
    frame_R, place_R = frame_N[left_R], place_N[left_R]
    order_R = (frame_R * (place_N.max() + 1) + place_R).argsort(stable=True)
    sorted_R = frame_R[order_R]
    turn_R = torch.arange(len(left_R), device=device) - torch.searchsorted(sorted_R, sorted_R)
    turn_R = torch.where(sorted_R == frames, turn_R + len(left_R), turn_R)
    return order_R[(turn_R * (frames + 1) + torch.cat([rank_F, rank_F.new_full((1,), frames)])[sorted_R]).argsort()]


def layout(grids: Sequence[TokenGrid], device: torch.device) -> tuple[Tensor, Tensor]:
    """Frame of each token, over all videos (a newline token: one past the last), and its place in the frame's pattern."""
    frames = sum(grid.frames for grid in grids)
    frame_of, place_of, before = [], [], 0
    for grid in grids:
        cell_P = torch.arange(grid.per_frame, device=device)
        row_P, column_P = cell_P // grid.width, cell_P % grid.width
        place_P = dither(row_P, column_P, grid.height, grid.width)
        # Frame f begins at the f-th cell of the pattern, so that frames with few tokens each do not all show one corner.
        frame_F = torch.arange(grid.frames, device=device)
        start_F1 = place_P.argsort()[frame_F % grid.per_frame, None]
        moved_FP = (row_P - start_F1 // grid.width) % grid.height * grid.width + (column_P - start_F1 % grid.width) % grid.width
        place_of += [place_P[moved_FP].flatten(), cell_P.new_zeros(grid.newline)]
        frame_of += [(before + frame_F).repeat_interleave(grid.per_frame), cell_P.new_full((grid.newline,), frames)]
        before += grid.frames
    return torch.cat(frame_of), torch.cat(place_of)


def dither(row_P: Tensor, column_P: Tensor, height: int, width: int) -> Tensor:
    """Place of each cell in Bayer's ordered-dither matrix, stretched: any number of first places is spread over the area."""
    bits = (max(height, width) - 1).bit_length()
    row_P, column_P = (row_P << bits) // height, (column_P << bits) // width
    place_P = torch.zeros_like(row_P)
    for bit in range(bits):
        place_P = place_P * 4 + 2 * ((row_P ^ column_P) >> bit & 1) + (row_P >> bit & 1)
    return place_P
