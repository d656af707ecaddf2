"""HoliTom: an optimal split of time, cells that stand still merged over it, the rest by saliency.

Shape suffixes: N video tokens of one video, F frames, E = F - 1 pairs of neighbouring frames, W windows, P tokens of one
frame, D width.
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
    """Split time so that most tokens are redundant, average these over their window, thin out the rest.
    HoliTom (arXiv 2505.21334), the part outside of the language model.

    A cell stands still in a window of frames when each two neighbouring ones have a cosine above `tau` there. Windows are the
    partition of the frames that maximises the sum of (cells that stand still) (length - 1), found by dynamic programming; of
    equally good ones the one with the latest beginnings is taken. In a window of two frames or more each such cell becomes
    its mean over time, at the first frame. Then every set (the moving tokens of a frame, the still means of a window) keeps
    the same share of its tokens, B / (N - removed): moving ones by saliency, still ones as the c centres of DPC-kNN
    (k = min(7, c)), centre := own centre + (1 - own) mean of the others of its cluster, as in the released code. tau is 0.8
    in the paper (0.65 where it keeps 10 %), own 0.6.

    Deviations: merging inside of the language model is left out, since a drafter's context is chosen before it runs. Shares
    are rounded by largest remainders, where the code rounds each set up or to the nearest, so that B tokens come out. Of equal
    densities the earlier token counts as denser, where the code adds noise.

    saliency: a signal of one number a token. The paper's is the vision encoder's attention. Ours, verifier_attention, is the
    target's: on the embedded pairs as many guesses are accepted with it, or clearly more (experiments/strategies).

    Signals: features and the saliency. Cost: N D, F^2 for the partition, and W P^2 D. Limits: sets of a token or two may go;
    where most of the video stands still, moving tokens and still means together may be fewer than B. Raises UserError for
    fields out of range; ValueError where the saliency holds NaN.
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
    """The best windows, each as (first frame, one past its last)."""
    frames, device = len(still_EP) + 1, still_EP.device
    pair_E1 = torch.arange(frames - 1, device=device)[:, None]
    # The last pair up to here in which a cell moves; it stands still in all windows that begin behind that.
    moved_EP = pair_E1.where(~still_EP, -1).cummax(0).values
    first_EF = torch.zeros(frames - 1, frames, dtype=torch.int64, device=device)
    first_EF.scatter_add_(1, moved_EP + 1, torch.ones_like(moved_EP))
    frame_F = torch.arange(frames, device=device)
    gain_FF = torch.zeros(frames, frames, dtype=torch.int64, device=device)  # of a window, by first and last frame
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
