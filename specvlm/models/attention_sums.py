"""Attention of a pass's last rows to the video tokens, added up in blocks.

Shape suffixes: H KV heads, G query heads per KV head, Q rows of the pass, K keys, N video tokens, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specvlm.models.vision_probe import BLOCK


class Sums(NamedTuple):
    """Attention to the video tokens.

    Attributes:
        heads_HN: (H, N) added over rows and the query heads of each KV head.
        last_N: (N,) of the last row, added over all heads.
        weighted_N: (N,) added over all heads and, times their weights, over rows. 0 without weights.
    """

    heads_HN: Tensor
    last_N: Tensor
    weighted_N: Tensor


def attention_sums(
    query_HGQD: Tensor, key_HKD: Tensor, scaling: float, index_N: Tensor, first: int = 0, weights_Q: Tensor | None = None
) -> Sums:
    """Add up the attention of rows from `first` on, which belong to the last Q of the keys, to the keys at `index_N`.

    Scores (H, G, Q, K) take BLOCK bytes at a time: several KV heads, or some rows of one head. Peak memory is about
    three blocks.
    """
    heads, group, count, _ = query_HGQD.shape
    wide = torch.promote_types(query_HGQD.dtype, torch.float32)  # bfloat16 would give unequal scores equal values
    row_bytes = group * key_HKD.shape[1] * wide.itemsize
    rows = max(1, min(count - first, BLOCK // row_bytes))
    step = max(1, BLOCK // (rows * row_bytes))
    heads_HK = torch.zeros(key_HKD.shape[:2], dtype=wide, device=query_HGQD.device)
    last_K, weighted_K = torch.zeros_like(heads_HK[0]), torch.zeros_like(heads_HK[0])
    counts_Q = None if weights_Q is None else weights_Q.to(heads_HK)
    for head in range(0, heads, step):
        keys_HDK = key_HKD[head : head + step].to(wide).mT
        for row in range(first, count, rows):
            queries_HGQD = query_HGQD[head : head + step, :, row : row + rows].to(wide) * scaling
            scores_HGQK = (queries_HGQD.flatten(1, 2) @ keys_HDK).unflatten(1, queries_HGQD.shape[1:3])
            future = torch.ones(queries_HGQD.shape[2], count, dtype=torch.bool, device=heads_HK.device).triu(row + 1)
            scores_HGQK[..., -count:].masked_fill_(future, float("-inf"))
            weights_HGQK = scores_HGQK.softmax(-1)
            heads_HK[head : head + step] += weights_HGQK.sum((1, 2))
            if counts_Q is not None:
                weighted_K += counts_Q[row : row + rows] @ weights_HGQK.sum((0, 1))
            if row + rows >= count:
                last_K += weights_HGQK[:, :, -1].sum((0, 1))
    index_N = index_N.to(heads_HK.device)
    return Sums(*(sums.index_select(-1, index_N) for sums in (heads_HK, last_K, weighted_K)))
