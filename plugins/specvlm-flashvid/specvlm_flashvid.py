"""FlashVID: keep diverse tokens of every frame, and merge the rest along trees over time.

Symbols and shape suffixes: B budget, N video tokens of one video, F frames, E = F - 1 pairs of neighbouring frames, P
tokens of one frame, S segments, L links, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.errors import check_choice, check_range
from specvlm.strategies import PruneContext, Pruner, token_signals
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.cluster import cluster
from specvlm.toolkit.segments import adjacent_cosine, apportion, cuts, spans, written
from specvlm.types import KeepSet


@dataclass(frozen=True)
class FlashVidPruner(Pruner):
    """Keep diverse, salient tokens of each frame, and merge the rest into trees over time. FlashVID (arXiv 2602.08024).

    Segments are cut between frames whose mean features have a cosine below `segment`, and at the least similar ones
    until there are `segments`. ADTS: p = ceil(alpha ceil(P B / N)) tokens per frame, by greedy max-min diversity under
    d_ij = (1 - cos_ij) a_j e_j, with the saliency a and the relevance to the segment e_j = x_j . (mean of its frames):
    first the token furthest from its nearest neighbour, then repeatedly the one furthest from those picked. TSTM: every
    other token links to the most similar other token one frame earlier in its segment if their cosine exceeds `merge`.
    Links form trees, and a tree becomes the mean of all its tokens at the place of its first. The B - p F tokens left
    are split among segments by length. If a segment has more trees than its share, they are clustered frame by frame
    (DPC-kNN, k = min(7, clusters)); a cluster is the mean of its trees at its centre. Defaults are the paper's or its
    code's.

    Deviations: exactly B tokens are kept, where the code rounds up in every frame: p is at most B / F, shares are
    rounded by largest remainders, and if a segment has fewer trees than its share, the weakest links are cut. The paper
    expands the budget by 1.25, and pays that back by pruning inside the language model; both are left out. Of equal
    densities the earlier token counts as denser; the code adds noise. Faults of the code are avoided: the mean of a
    chain weighs all tokens equally, no token is picked twice, and a short video has no empty segments.

    Signals: features and the saliency. Cost: three products of N P D, a loop of p short steps and one over segments.
    Limits: a frame whose share of the remaining budget is 0 loses its unpicked trees.

    Attributes:
        alpha: Share of a frame's tokens that ADTS picks, 0 to 1.
        merge: Least cosine for linking two tokens.
        segment: Cosine of neighbouring frames below which a segment is cut.
        segments: Fewest segments.
        relevance: False leaves e out, as attn_div of the code does.
        quota: How the remaining budget is split: by `segment`, or over the whole `video` (ours).
        mean: What a cluster is the mean of: its trees (`tree`), or all tokens of its trees (`token`, ours).
        saliency: A signal of one number per token. The paper uses the vision encoder's attention. verifier_attention
            (ours) is the target's: on the embedded pairs as many guesses are accepted with it, or clearly more
            (experiments/strategies).

    Raises:
        UserError: A field is out of range.
        ValueError: The saliency contains NaN.
    """

    name = "flashvid"
    paper = "FlashVID (arXiv 2602.08024)"
    fidelity = "adapted"
    alpha: float = 0.7
    merge: float = 0.8
    segment: float = 0.9
    segments: int = 8
    relevance: bool = True
    quota: str = "segment"
    mean: str = "tree"
    saliency: str = "vision_attention"

    def __post_init__(self) -> None:
        check_range("flashvid: alpha", self.alpha, 0, 1)
        check_choice("flashvid: quota", self.quota, ("segment", "video"))
        check_choice("flashvid: mean", self.mean, ("tree", "token"))
        check_choice("flashvid: saliency", self.saliency, token_signals())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features", self.saliency})

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,), (saliency_FP,) = ctx.by_frame(ctx.features.float()), ctx.by_frame(ctx.scores(self.saliency))
        frames, per_frame = saliency_FP.shape
        unit_FPD, mean_FD = normalize(x_FPD, dim=-1), x_FPD.mean(1)
        cut_E = cuts(adjacent_cosine(mean_FD), self.segment, self.segments)
        segments = spans(cut_E)
        if self.relevance:
            event_FD = torch.cat([mean_FD[start:stop].mean(0).expand(stop - start, -1) for start, stop in segments])
            saliency_FP = saliency_FP * (x_FPD @ event_FD[:, :, None]).squeeze(2)
        picks = min(math.ceil(written(self.alpha) * -(-per_frame * ctx.budget // ctx.total)), ctx.budget // frames)
        picked_FP = diverse(unit_FPD, saliency_FP, picks)

        parts = segments if self.quota == "segment" else [(0, frames)]
        length_S = torch.tensor([stop - start for start, stop in parts], device=ctx.device)
        quota_S = apportion(ctx.budget - frames * picks, length_S)
        most_S = length_S * (per_frame - picks) - quota_S
        part_F = torch.repeat_interleave(torch.arange(len(parts), device=ctx.device), length_S)
        owner_N = trees(*self.links(unit_FPD, picked_FP, cut_E, part_F, most_S))
        here_N = torch.arange(ctx.total, device=owner_N.device)
        root_FP = (owner_N == here_N).view_as(picked_FP) & ~picked_FP
        tokens_N = torch.bincount(owner_N, minlength=ctx.total)
        weight_N = 1 / tokens_N[owner_N] if self.mean == "tree" else torch.ones_like(here_N)
        size_F = root_FP.sum(1)
        if int(size_F.sum()) > int(quota_S.sum()):
            quotas = quota_S.tolist()
            count_F = torch.cat([apportion(q, size_F[slice(*part)]) for q, part in zip(quotas, parts, strict=True)])
            owner_N = clustered(x_FPD, owner_N, tokens_N, root_FP, count_F)
        return KeepSet.merge(owner_N, here_N, weight_N, ctx.total)

    def links(
        self, unit_FPD: Tensor, picked_FP: Tensor, cut_E: Tensor, part_F: Tensor, most_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(E, P) True if a token of the later frame is linked, and (E, P) the token it is linked to.

        Each part has at most `most_S` links.
        """
        cosine_EPP = unit_FPD[1:] @ unit_FPD[:-1].mT
        best_EP, parent_EP = cosine_EPP.masked_fill_(picked_FP[:-1, None, :], float("-inf")).max(-1)
        link_EP = (best_EP > self.merge) & ~picked_FP[1:] & ~cut_E[:, None]
        part_L = part_F[1:, None].expand_as(link_EP).flatten()
        order_L = best_EP.masked_fill(~link_EP, float("-inf")).flatten().sort(descending=True, stable=True).indices
        order_L = order_L[part_L[order_L].sort(stable=True).indices]  # by part, the strongest first in each
        before_S = torch.bincount(part_L, minlength=len(most_S)).cumsum(0)
        before_S = torch.cat([before_S.new_zeros(1), before_S[:-1]])
        rank_L = torch.empty_like(order_L)
        rank_L[order_L] = torch.arange(len(order_L), device=order_L.device) - before_S[part_L[order_L]]
        return link_EP & (rank_L < most_S[part_L]).view_as(link_EP), parent_EP


def trees(link_EP: Tensor, parent_EP: Tensor) -> Tensor:
    """(N,) root of each token's tree; the token itself without a link."""
    frames, per_frame = len(link_EP) + 1, link_EP.shape[1]
    here_FP = torch.arange(frames * per_frame, device=link_EP.device).view(frames, per_frame)
    roots = [here_FP[0]]
    for frame in range(1, frames):
        roots.append(torch.where(link_EP[frame - 1], roots[-1][parent_EP[frame - 1]], here_FP[frame]))
    return torch.cat(roots)


def clustered(x_FPD: Tensor, owner_N: Tensor, tokens_N: Tensor, root_FP: Tensor, count_F: Tensor) -> Tensor:
    """(N,) owners after merging the trees of each frame until `count_F` are left. tokens_N: tokens of each root."""
    frames, per_frame = root_FP.shape
    x_ND = x_FPD.flatten(0, 1)
    sum_ND = torch.zeros_like(x_ND).index_put_((owner_N,), x_ND, accumulate=True)  # deterministic on a GPU, too
    mean_ND = sum_ND / tokens_N.clamp(min=1)[:, None]
    _, centre_FP = cluster(mean_ND.view_as(x_FPD), count_F, mask_GP=root_FP, capped=True)
    first_F1 = per_frame * torch.arange(frames, device=owner_N.device)[:, None]
    onto_FP = torch.where(centre_FP >= 0, first_F1 + centre_FP, -1)
    onto_N = torch.where(root_FP, onto_FP, torch.arange(len(owner_N), device=owner_N.device).view_as(root_FP)).flatten()
    return onto_N[owner_N]


def diverse(unit_FPD: Tensor, saliency_FP: Tensor, picks: int) -> Tensor:
    """(F, P) bool: `picks` tokens of every frame, by greedy max-min diversity; ties go to the earlier token."""
    picked_FP = torch.zeros_like(saliency_FP, dtype=torch.bool)
    if picks == 0:
        return picked_FP
    distance_FPP = (1 - unit_FPD @ unit_FPD.mT) * saliency_FP[:, None, :]
    frame_F, eye_PP = (
        torch.arange(len(picked_FP), device=picked_FP.device),
        torch.eye(picked_FP.shape[1], device=picked_FP.device),
    )
    far_FP = distance_FPP.masked_fill(eye_PP.bool(), float("inf")).amin(1)
    for turn in range(picks):
        pick_F = far_FP.masked_fill(picked_FP, float("-inf")).argmax(1)
        picked_FP[frame_F, pick_F] = True
        to_pick_FP = distance_FPP[frame_F, pick_F]
        far_FP = to_pick_FP if turn == 0 else torch.minimum(far_FP, to_pick_FP)
    return picked_FP


@hookimpl
def specvlm_strategies() -> list[type]:
    return [FlashVidPruner]
