"""Keep what the target attends to, and an even sample of the rest: SpecVLM's own pruner.

Shape suffixes: N video tokens, R tokens left over by stage I, F frames, P tokens of one frame.
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
PART = 8  # under AUTO, stage I gets at most the budget divided by this
MASS = f"above 0 and at most 1, or {AUTO}"


@dataclass(frozen=True)
class TwoStagePruner(Pruner):
    """Keep the few tokens that hold most of the target's attention, and spend the left-over budget evenly.

    SpecVLM's pruner (arXiv 2508.16201), for a budget B = floor(N (1 - ratio)). Let a_j be the target's mean attention
    from the text after the video to video token j.

    Stage I takes the smallest set I with sum_{j in I} a_j >= mass * sum_j a_j, highest a_j first, but at most B tokens.
    Ties go to the earlier token. Stage II takes k = B - |I| of the R = N - |I| leftovers: in raster order, those at
    floor(i (R - 1) / (k - 1)) for i = 0..k-1; if k = 1, the first.

    Deviations: none by default; mass=auto and spread=frame are our own. Numbers are computed exactly: of 480 tokens a
    ratio of 0.9 leaves 48, where the floats of the released code leave 47.

    Cost: a sort of N, one of B (more with spread=frame), and a few small reads by the host; the signal is a by-product
    of the target's prefill.
    Limits: if no token receives any attention, stage I is empty; with spread=linspace the result is then that of
    `uniform`.

    Attributes:
        mass: Share of the attention that stage I retains, above 0 and at most 1, or `auto`. The released code has 0.4;
            a reproduction reports 0.5 for Qwen2.5-VL. `auto` is 0.4 with at most floor(B / 8) tokens in stage I, so
            that at least seven eighths of the budget are left to stage II, however far the attention spreads.
        spread: How stage II spreads its tokens. `linspace` is the paper's one-dimensional stride over time, rows and
            columns. `frame` gives every frame the same number of stage II tokens, give or take one (less if it runs out
            of tokens); frames with the fewest stage I tokens get one more. Within a frame it spreads them in two
            dimensions, by an ordered-dither pattern that is shifted from frame to frame. It reaches every frame if k is
            at least the number of frames without a stage I token.

    Raises:
        UserError: A field is out of range.
        ValueError: The attention contains a NaN, infinite or negative value.
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
        """Take the tokens of stage I, then those of stage II from the leftovers."""
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
        """Return how many tokens stage I takes of the budget, given the scores in descending order."""
        if isinstance(self.mass, str):
            return min(retained(descending_N, PAPER), budget // PART)
        return min(retained(descending_N, self.mass), budget)


def retained(descending_N: Tensor, mass: float) -> int:
    """Return the length of the shortest prefix of the scores that sums to at least `mass` of their total.

    The scores are rounded to multiples of a power of two, near the highest score / 2^47 for 16k tokens, and summed as
    integers; `mass` is taken as an exact fraction. So equal sums compare as equal, 0.07 of 100 is 7, and the result
    does not depend on the order in which a device sums. Sums of floats guarantee none of this, and CUDA refuses a
    cumsum of floats under deterministic algorithms.

    Raises:
        ValueError: A score is NaN, infinite or negative.
    """
    peak, low = torch.stack([descending_N[0], descending_N[-1]]).tolist()
    if not 0 <= low <= peak < math.inf:  # NaN sorts first, and every comparison with it is false
        raise ValueError(f"attention must be finite and not negative, got values from {low} to {peak}")
    count = len(descending_N)
    unit = 2.0 ** (math.frexp(peak)[1] - 62 + count.bit_length())
    units_N = (descending_N.double() / unit).round().long()
    sums_N = units_N.cumsum(0)
    enough = math.ceil(written(mass) * int(sums_N[-1]))
    return int((sums_N - units_N < enough).sum())


def by_frame(grids: Sequence[TokenGrid], taken_N: Tensor) -> Tensor:
    """Return the order in which `spread=frame` takes the leftovers: one per frame in turn, newline tokens last.

    Returns:
        (R,) indices of the leftovers, those not set in `taken_N`.
    """
    device, frames = taken_N.device, sum(grid.frames for grid in grids)
    frame_N, place_N = layout(grids, device)
    # Within a turn, frames with the fewest stage I tokens come first. Equal ones are ordered so that the first few are
    # spread over time.
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
    """Return the frame of each token over all videos, and its place in the dither pattern of that frame.

    The frame of a newline token is the number of frames, one past the last.
    """
    frames = sum(grid.frames for grid in grids)
    frame_of, place_of, before = [], [], 0
    for grid in grids:
        cell_P = torch.arange(grid.per_frame, device=device)
        row_P, column_P = cell_P // grid.width, cell_P % grid.width
        place_P = dither(row_P, column_P, grid.height, grid.width)
        # Frame f begins at the f-th cell of the pattern. Otherwise, with few tokens per frame, all frames would show
        # the same corner.
        frame_F = torch.arange(grid.frames, device=device)
        start_F1 = place_P.argsort()[frame_F % grid.per_frame, None]
        moved_FP = (row_P - start_F1 // grid.width) % grid.height * grid.width + (column_P - start_F1 % grid.width) % grid.width
        place_of += [place_P[moved_FP].flatten(), cell_P.new_zeros(grid.newline)]
        frame_of += [(before + frame_F).repeat_interleave(grid.per_frame), cell_P.new_full((grid.newline,), frames)]
        before += grid.frames
    return torch.cat(frame_of), torch.cat(place_of)


def dither(row_P: Tensor, column_P: Tensor, height: int, width: int) -> Tensor:
    """Return the place of each cell in Bayer's ordered-dither matrix, stretched to the frame.

    The first n cells in this order are spread over the whole area, for every n.
    """
    bits = (max(height, width) - 1).bit_length()
    row_P, column_P = (row_P << bits) // height, (column_P << bits) // width
    place_P = torch.zeros_like(row_P)
    for bit in range(bits):
        place_P = place_P * 4 + 2 * ((row_P ^ column_P) >> bit & 1) + (row_P >> bit & 1)
    return place_P
