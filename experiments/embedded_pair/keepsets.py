"""Keep sets for pruned training contexts and for the quick evaluation, batched: which K of the N video tokens the draft sees.

The library's pruners are the reference; these are here because training needs thousands of them a minute on the device.
Legend: B videos, N video tokens, K kept.
"""

import torch
from torch import Tensor

POLICIES = ("two_stage", "attention", "uniform", "random")


def keep_set(policy: str, attention_BN: Tensor, count: int, mass: float = 0.4) -> Tensor:
    """Sorted indices (B, K) of the `count` tokens that the policy keeps."""
    batch, total = attention_BN.shape
    if policy == "two_stage":
        return _two_stage(attention_BN.float(), count, mass)
    if policy == "uniform":
        return _spread(torch.full((batch,), total, device=attention_BN.device), count).clamp(max=total - 1)
    score = attention_BN if policy == "attention" else torch.rand(batch, total, device=attention_BN.device)
    return score.topk(count).indices.sort(1).values


def _spread(totals_B: Tensor, count: int | Tensor) -> Tensor:
    """`linspace(0, total - 1, count)` for every row, in integers; entries beyond a row's own count repeat its last."""
    most = int(count.max()) if isinstance(count, Tensor) else count
    counts = count if isinstance(count, Tensor) else torch.full_like(totals_B, count)
    step = torch.arange(most, device=totals_B.device).minimum((counts - 1).clamp(min=0)[:, None])
    return step * (totals_B - 1)[:, None] // (counts - 1).clamp(min=1)[:, None]


def _two_stage(attention_BN: Tensor, count: int, mass: float) -> Tensor:
    """Stage I: the smallest prefix of the descending scores with `mass` of their sum. Stage II: the rest, evenly spread."""
    batch, total = attention_BN.shape
    value, order = attention_BN.sort(1, descending=True)
    before = value.cumsum(1) - value
    chosen = (before < mass * value.sum(1, keepdim=True)) & (torch.arange(total, device=value.device) < count)
    first = torch.zeros_like(chosen).scatter(1, order, chosen)
    left = count - first.sum(1)
    rank = (~first).cumsum(1) - 1  # place of a token among those that stage I left
    picks = _spread(total - first.sum(1), left)
    wanted = torch.zeros_like(first)
    if picks.shape[1]:
        wanted.scatter_(1, picks, (left > 0)[:, None].expand_as(picks))
    kept = first | (wanted.gather(1, rank.clamp(min=0)) & ~first)
    return kept.nonzero()[:, 1].view(batch, count)
