"""Density-peak clustering of a frame's tokens (DPC-kNN), for authors of pruners and mergers.

Rodriguez and Laio, Science 344 (2014); with k nearest neighbours: Du et al., Knowledge-Based Systems 99 (2016).
FlashVID, FastVID, HoliTom and PruneVid all pick their centres this way.

Shape suffixes: G groups (frames, segments), P tokens per group, D feature size, K nearest neighbours.
"""

import torch
from torch import Tensor

ENTRIES = 1 << 25  # maximum number of distances in memory at once, unless a single group has more


def density_scores(x_GPD: Tensor, k: int = 7, mask_GP: Tensor | None = None) -> Tensor:
    """Score tokens as cluster centres. Dense tokens that are far from any denser one score highest.

    score_i = log(density_i * gamma_i), where d_ij = |x_i - x_j| / sqrt(D); density_i = exp(-mean of d_ij^2 over the k
    nearest tokens j, including i itself); gamma_i = min d_ij over denser j, or max d_ij for the densest token. Of
    equally dense tokens the earlier counts as denser; the published implementations add noise instead. Computed in
    logs, since exp(-d^2) underflows to 0 in float32 for tokens that are far apart. Takes time proportional to G P^2 D.

    Args:
        x_GPD: (G, P, D) features.
        k: Number of nearest tokens that the density is computed from; groups with fewer tokens use all of them.
        mask_GP: (G, P) bool, tokens to use; all by default.

    Returns:
        (G, P) scores in float32; -inf outside the mask.
    """
    return torch.cat([_scores(_squares(x, m), k) for x, m in _parts(x_GPD, _or_all(x_GPD, mask_GP))])


def cluster(
    x_GPD: Tensor, count_G: Tensor, k: int = 7, mask_GP: Tensor | None = None, capped: bool = False
) -> tuple[Tensor, Tensor]:
    """Cluster each group's tokens around those with the highest `density_scores`. Ties go to the earlier token.

    Takes time proportional to G P^2 D.

    Args:
        x_GPD: (G, P, D) features.
        count_G: (G,) number of centres per group.
        k: Number of nearest tokens that the density is computed from.
        mask_GP: (G, P) bool, tokens to use; all by default.
        capped: Lower k to the group's number of centres if that is less, as HoliTom and FlashVID do.

    Returns:
        (G, P) bool, true for centres; and (G, P) int64, the index within the group of each token's nearest centre (for
        a centre, of itself). The index is -1 outside the mask and in groups without a centre.
    """
    mask_GP = _or_all(x_GPD, mask_GP)
    centres, owners = [], []
    start, here_P = 0, torch.arange(x_GPD.shape[1], device=x_GPD.device)
    for x, mask in _parts(x_GPD, mask_GP):
        count = count_G[start : start + len(x), None]
        start += len(x)
        squares_GPP = _squares(x, mask)
        order = _scores(squares_GPP, k, count if capped else None).sort(dim=1, descending=True, stable=True).indices
        centre = (order.argsort(dim=1) < count) & mask
        nearest = squares_GPP.masked_fill(~centre[:, None, :], float("inf")).argmin(-1)
        nearest = torch.where(centre, here_P, nearest)
        centres.append(centre)
        owners.append(nearest.masked_fill(~(mask & centre.any(1, keepdim=True)), -1))
    return torch.cat(centres), torch.cat(owners)


def _or_all(x_GPD: Tensor, mask_GP: Tensor | None) -> Tensor:
    """Return the mask, or one that includes all tokens if there is none."""
    return x_GPD.new_ones(x_GPD.shape[:2], dtype=torch.bool) if mask_GP is None else mask_GP


def _parts(x_GPD: Tensor, mask_GP: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split into batches of groups. A batch has at most ENTRIES distances, unless a single group has more."""
    step = max(1, ENTRIES // max(x_GPD.shape[1] ** 2, 1))
    return list(zip(x_GPD.split(step), mask_GP.split(step), strict=True))


def _squares(x_GPD: Tensor, mask_GP: Tensor) -> Tensor:
    """Compute (G, P, P) squared distances divided by D: 0 on the diagonal, inf if either token is outside the mask."""
    x_GPD = x_GPD.float()
    gram_GPP = x_GPD @ x_GPD.mT
    norm_GP = gram_GPP.diagonal(dim1=1, dim2=2)
    squares_GPP = (norm_GP[:, :, None] + norm_GP[:, None, :] - 2 * gram_GPP).clamp_(min=0) / x_GPD.shape[2]
    squares_GPP.diagonal(dim1=1, dim2=2).zero_()
    return squares_GPP.masked_fill_(~(mask_GP[:, :, None] & mask_GP[:, None, :]), float("inf"))


def _scores(squares_GPP: Tensor, k: int, most_G1: Tensor | None = None) -> Tensor:
    """Compute `density_scores` from squared distances. most_G1: (G, 1) limit on k for each group."""
    near_GPK = squares_GPP.topk(min(k, squares_GPP.shape[-1]), dim=-1, largest=False).values
    there_GPK = near_GPK.isfinite()
    if most_G1 is not None:
        there_GPK &= torch.arange(near_GPK.shape[-1], device=near_GPK.device) < most_G1.clamp(min=1)[:, :, None]
    mask_GP = there_GPK.any(-1)
    log_density_GP = -(near_GPK.masked_fill(~there_GPK, 0).sum(-1) / there_GPK.sum(-1).clamp(min=1))
    log_density_GP = log_density_GP.masked_fill(~mask_GP, float("-inf"))
    place_P = torch.arange(squares_GPP.shape[-1], device=squares_GPP.device)
    mine_GP1, other_G1P = log_density_GP[:, :, None], log_density_GP[:, None, :]
    denser_GPP = (other_G1P > mine_GP1) | ((other_G1P == mine_GP1) & (place_P < place_P[:, None]))
    above_GP = squares_GPP.masked_fill(~denser_GPP, float("inf")).amin(-1)
    furthest_GP = squares_GPP.masked_fill(~squares_GPP.isfinite(), 0).amax(-1)
    gamma_GP = torch.where(above_GP.isfinite(), above_GP, furthest_GP).sqrt()
    scores_GP = (log_density_GP + gamma_GP.log()).clamp(min=torch.finfo(torch.float32).min)
    return scores_GP.masked_fill(~mask_GP, float("-inf"))
