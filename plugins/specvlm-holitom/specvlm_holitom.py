"""HoliTom: split time optimally, merge static cells over each window, and keep the rest by saliency.

Symbols and shape suffixes: B budget, N video tokens of one video, F frames, E = F - 1 pairs of neighbouring frames, W
windows, P tokens of one frame, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.errors import check_choice, check_range
from specvlm.strategies import PruneContext, Pruner, token_signals
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.cluster import cluster
from specvlm.toolkit.segments import adjacent_cosine, apportion
from specvlm.types import KeepSet


@dataclass(frozen=True)
class HoliTomPruner(Pruner):
    """Split time into windows of mostly static cells, average these, and thin out the rest. HoliTom (arXiv 2505.21334).

    This is the part of HoliTom outside the language model. A cell is static in a window of frames if every two
    neighbouring frames have a cosine above `tau` there. The windows are the partition of the frames that maximizes the
    sum of (static cells) (length - 1), found by dynamic programming; of equally good ones, the one whose windows start
    latest. In a window of two or more frames each static cell becomes its mean over time, at the first frame. Then
    every set (the moving tokens of a frame, the static means of a window) keeps the same share of its tokens, B / (N -
    removed): moving tokens by saliency, static means as the c centres of DPC-kNN (k = min(7, c)), centre := own centre
    + (1 - own) mean of the others of its cluster, as in the released code. tau is 0.8 in the paper (0.65 where it keeps
    10 %), own 0.6.

    Deviations: merging inside the language model is left out, since a drafter's context is chosen before it runs.
    Shares are rounded by largest remainders, so that exactly B tokens are kept; the code rounds each set up or to the
    nearest. Of equal densities the earlier token counts as denser; the code adds noise.

    Signals: features and the saliency. Cost: N D, F^2 for the partition, and W P^2 D. Limits: sets of a token or two
    may lose all; if most of the video is static, moving tokens and static means together may be fewer than B.

    Attributes:
        tau: Cosine above which a cell counts as static from one frame to the next.
        own: Weight of a centre in its cluster's mean, 0 to 1.
        saliency: A signal of one number per token. The paper uses the vision encoder's attention. verifier_attention
            (ours) is the target's: on the embedded pairs as many guesses are accepted with it, or clearly more
            (experiments/strategies).

    Raises:
        UserError: A field is out of range.
        ValueError: The saliency contains NaN.
    """

    name = "holitom"
    paper = "HoliTom (arXiv 2505.21334)"
    fidelity = "adapted"
    tau: float = 0.8
    own: float = 0.6
    saliency: str = "vision_attention"

    def __post_init__(self) -> None:
        check_range("holitom: own", self.own, 0, 1)
        check_choice("holitom: saliency", self.saliency, token_signals())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features", self.saliency})

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,), (saliency_FP,) = ctx.by_frame(ctx.features.float()), ctx.by_frame(ctx.scores(self.saliency))
        per_frame = x_FPD.shape[1]
        still_EP = adjacent_cosine(x_FPD) > self.tau
        windows = partition(still_EP)
        still_WP = torch.stack([still_EP[start : stop - 1].all(0) & (stop - start > 1) for start, stop in windows])
        length_W = torch.tensor([stop - start for start, stop in windows], device=ctx.device)
        window_F = torch.repeat_interleave(torch.arange(len(windows), device=ctx.device), length_W)
        moving_FP = ~still_WP[window_F]
        share = apportion(ctx.budget, torch.cat([moving_FP.sum(1), still_WP.sum(1)]))

        order_FP = saliency_FP.masked_fill(~moving_FP, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        chosen = ((order_FP.argsort(dim=1) < share[: len(moving_FP), None]) & moving_FP).flatten().nonzero().flatten()

        mean_WPD = torch.stack([x_FPD[start:stop].mean(0) for start, stop in windows])
        centre_WP, owner_WP = cluster(mean_WPD, share[len(moving_FP) :], mask_GP=still_WP, capped=True)
        first_W1 = (length_W.cumsum(0) - length_W)[:, None] * per_frame
        size_WP = torch.zeros_like(owner_WP).scatter_add_(1, owner_WP.clamp(min=0), (owner_WP >= 0).long())
        others_WP = size_WP.gather(1, owner_WP.clamp(min=0)) - 1
        weight_WP = torch.where(centre_WP, torch.where(others_WP > 0, self.own, 1.0), (1 - self.own) / others_WP.clamp(min=1))
        onto_FP = torch.where(owner_WP >= 0, first_W1 + owner_WP, -1)[window_F]
        here_N = torch.arange(ctx.total, device=ctx.device)
        return KeepSet.merge(
            torch.cat([chosen, onto_FP.flatten()]),
            torch.cat([chosen, here_N]),
            torch.cat([torch.ones_like(chosen, dtype=torch.float32), weight_WP[window_F].flatten()]),
            ctx.total,
        )


def partition(still_EP: Tensor) -> list[tuple[int, int]]:
    """Return the best windows, each as (first frame, last frame + 1)."""
    frames, device = len(still_EP) + 1, still_EP.device
    pair_E1 = torch.arange(frames - 1, device=device)[:, None]
    # The last pair so far in which a cell moves. It is static in all windows that start after that pair.
    moved_EP = pair_E1.where(~still_EP, -1).cummax(0).values
    first_EF = torch.zeros(frames - 1, frames, dtype=torch.int64, device=device)
    first_EF.scatter_add_(1, moved_EP + 1, torch.ones_like(moved_EP))
    frame_F = torch.arange(frames, device=device)
    gain_FF = torch.zeros(frames, frames, dtype=torch.int64, device=device)  # gain of a window by first and last frame
    gain_FF[:, 1:] = (first_EF.cumsum(1) * (pair_E1 + 1 - frame_F).clamp(min=0)).T
    gain_FF = gain_FF.cpu()
    best, begin = torch.zeros(frames + 1, dtype=torch.int64), []
    for stop in range(1, frames + 1):
        value = best[:stop] + gain_FF[:stop, stop - 1]
        begin.append(stop - 1 - int(value.flip(0).argmax()))
        best[stop] = value[begin[-1]]
    windows, stop = [], frames
    while stop:
        windows.append((begin[stop - 1], stop))
        stop = begin[stop - 1]
    return windows[::-1]


@hookimpl
def specvlm_strategies() -> list[type]:
    return [HoliTomPruner]
