"""PruneVid: average static cells over segments, cluster similar tokens, and keep clusters by the target's attention.

Symbols and shape suffixes: B budget, N video tokens of one video, F frames, G scenes, P tokens of one frame, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.errors import check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.cluster import cluster
from specvlm.toolkit.segments import apportion, spans, written
from specvlm.types import KeepSet

SMALL = 14  # sets up to this size are not clustered


@dataclass(frozen=True)
class PruneVidPruner(Pruner):
    """Merge static cells of a segment and similar tokens of a frame, and keep the most attended clusters.

    PruneVid (arXiv 2412.16117). Segments: frames are clustered by DPC-kNN (k = 7) on their mean features around S =
    ceil(`scenes` F) centres, and cut where the cluster changes. If that gives more than S segments, neighbours are
    joined, those with the most similar adjoining frames first, until S are left. Cells whose mean pairwise cosine over
    their segment exceeds `tau` are static; they become their mean over time, at the first frame of the segment. The
    static cells of a segment, and the other cells of each frame, are merged by DPC-kNN to ceil(`merge` size) clusters
    if there are more than 14. The B clusters of highest attention are kept, static and moving ones ranked together (Eq.
    8); the attention of a cluster is the highest of its tokens. tau = 0.8, scenes = 0.25 and merge = 0.5 are the
    paper's.

    Deviations: attention is the target's mean over layers, heads and rows, which is what a prefill provides; the paper
    takes the maximum over heads and rows of its layer 10. B is the run's budget; the paper keeps 40 %. If there are
    fewer clusters than B, `merge` is raised to fill the budget. Of equal densities the earlier token counts as denser;
    the code adds noise. How segments are joined is ours: the paper wants S consecutive segments and does not say how;
    the code drops short runs of a cluster, which joins scenes, and fails on segments of one frame.

    Signals: features, verifier_attention. Cost: N D and (F + S) P^2 D. Limits: if little moves, static means and moving
    tokens together may be fewer than B.

    Attributes:
        tau: Mean cosine above which a cell is static.
        scenes: Segments per frame, 0 to 1.
        merge: Clusters per token of a set, 0 to 1.

    Raises:
        UserError: A field is out of range.
        ValueError: The attention contains NaN.
    """

    name = "prunevid"
    paper = "PruneVid (arXiv 2412.16117)"
    fidelity = "adapted"
    needs = frozenset({"features", "verifier_attention"})
    tau: float = 0.8
    scenes: float = 0.25
    merge: float = 0.5

    def __post_init__(self) -> None:
        check_range("prunevid: scenes", self.scenes, 0, 1)
        check_range("prunevid: merge", self.merge, 0, 1)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,) = ctx.by_frame(ctx.features.float())
        frames, per_frame, _ = x_FPD.shape
        scene_F, first_G, length_G = self.split(x_FPD.mean(1))
        mean_GPD, static_GP = still(x_FPD, length_G, self.tau)

        x_RPD = torch.cat([mean_GPD, x_FPD])  # R = G + F sets: static cells of each scene, then moving ones of each frame
        mask_RP = torch.cat([static_GP, ~static_GP[scene_F]])
        count_R = self.counts(mask_RP.sum(1), ctx.budget)
        _, owner_RP = cluster(x_RPD, count_R, mask_GP=mask_RP)
        first_R = torch.cat([first_G, torch.arange(frames, device=ctx.device)]) * per_frame
        onto_RP = torch.where(owner_RP >= 0, first_R[:, None] + owner_RP, -1)
        owner_N = torch.where(static_GP[scene_F], onto_RP[: len(first_G)][scene_F], onto_RP[len(first_G) :]).flatten()

        owner_N = attended(owner_N, ctx.scores("verifier_attention"), ctx.budget)
        here_N = torch.arange(ctx.total, device=ctx.device)
        return KeepSet.merge(owner_N, here_N, torch.ones_like(here_N), ctx.total)

    def split(self, frame_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scene of each frame, and the first frame and length of each scene."""
        count = max(math.ceil(written(self.scenes) * len(frame_FD)), 1)
        (label_F,) = cluster(frame_FD[None], torch.tensor([count], device=frame_FD.device))[1]
        # Every cluster has a frame, so the labels change at least count - 1 times.
        gap_E = (frame_FD[1:] - frame_FD[:-1]).square().sum(-1).masked_fill(label_F[1:] == label_F[:-1], float("-inf"))
        cut_E = torch.zeros_like(gap_E, dtype=torch.bool)
        cut_E[gap_E.sort(descending=True, stable=True).indices[: count - 1]] = True
        runs = spans(cut_E)
        first_G, stop_G = torch.tensor(runs, device=frame_FD.device).T
        length_G = stop_G - first_G
        return torch.repeat_interleave(torch.arange(len(runs), device=frame_FD.device), length_G), first_G, length_G

    def counts(self, size_R: Tensor, budget: int) -> Tensor:
        """Return the number of clusters of each set: the paper's share, or more if the budget has room."""
        merge = written(self.merge)
        merged = [math.ceil(merge * size) for size in size_R.tolist()]
        count_R = torch.where(size_R > SMALL, torch.tensor(merged, device=size_R.device), size_R)
        if int(count_R.sum()) >= budget:
            return count_R
        return count_R + apportion(min(budget, int(size_R.sum())) - int(count_R.sum()), size_R - count_R)


def still(x_FPD: Tensor, length_G: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(G, P, D) mean of each cell over its scene, and (G, P) True if the mean cosine of its frame pairs exceeds tau."""
    lengths = length_G.tolist()
    mean_GPD = torch.stack([x.mean(0) for x in x_FPD.split(lengths)])
    unit_FPD = normalize(x_FPD, dim=-1)
    # The sum over all pairs equals the square of the sum minus the sum of squares.
    square_GP = torch.stack([unit.sum(0).square().sum(-1) for unit in unit_FPD.split(lengths)])
    own_GP = torch.stack([own.sum(0) for own in unit_FPD.square().sum(-1).split(lengths)])
    pairs_G1 = (length_G * (length_G - 1))[:, None]
    return mean_GPD, ((square_GP - own_GP) / pairs_G1.clamp(min=1) > tau) & (pairs_G1 > 0)


def attended(owner_N: Tensor, attention_N: Tensor, budget: int) -> Tensor:
    """(N,) owners of the `budget` clusters of highest attention; -1 for tokens of the others."""
    member_N = owner_N >= 0
    best_N = torch.full_like(attention_N, float("-inf"))
    best_N.scatter_reduce_(0, owner_N[member_N], attention_N[member_N], "amax")
    stays_N = torch.zeros_like(member_N)
    stays_N[best_N.sort(descending=True, stable=True).indices[:budget]] = True
    return torch.where(member_N & stays_N[owner_N.clamp(min=0)], owner_N, -1)


@hookimpl
def specvlm_strategies() -> list[type]:
    return [PruneVidPruner]
