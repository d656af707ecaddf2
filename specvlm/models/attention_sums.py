"""Attention of a pass's last rows to the video tokens, added up in blocks.

Shape suffixes: H KV heads, G query heads per KV head, Q rows of the pass, K keys, N video tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from specvlm.models.padding import pays
from specvlm.models.vision_probe import BLOCK

Adder = Callable[[Tensor, Tensor, float, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]


class Sums(NamedTuple):
    """Attention to each video token, summed.

    Attributes:
        heads_HN: (H, N) sums over rows and over the query heads of each KV head.
        last_N: (N,) sums over all heads, for the last row only.
        weighted_N: (N,) sums over all heads and rows, each row times its weight. 0 without weights.
    """

    heads_HN: Tensor
    last_N: Tensor
    weighted_N: Tensor


def attention_sums(
    query_HGQD: Tensor, key_HKD: Tensor, scaling: float, index_N: Tensor, first: int = 0, weights_Q: Tensor | None = None
) -> Sums:
    """Add up the attention that a pass's rows pay to the keys at `index_N`.

    On a GPU in 16 bits, this runs the kernels of `attention_kernels`, which store no scores. Elsewhere the scores
    (H, G, Q, K) are computed in blocks of BLOCK bytes: those of several KV heads, or of some rows of one head. Peak
    memory is then about three blocks.

    Args:
        query_HGQD: Rotated queries. They belong to the last Q keys, and attention is causal.
        key_HKD: Rotated keys.
        scaling: Factor of the scores.
        index_N: Indices of the keys to read, those of the video tokens.
        first: Index of the first row that counts; rows before it are left out.
        weights_Q: Row weights for `Sums.weighted_N`.
    """
    kernel = kernel_for(query_HGQD.dtype, query_HGQD.device)
    found = _by_torch if kernel is None else kernel
    index_N = index_N.to(query_HGQD.device)
    return Sums(*(sums.index_select(-1, index_N) for sums in found(query_HGQD, key_HKD, scaling, first, weights_Q)))


@cache
def kernel_for(dtype: torch.dtype, device: torch.device) -> Adder | None:
    """Return the function that launches the kernels, for a GPU in 16 bits. None elsewhere, or if they do not run."""
    if not pays(dtype, device):
        return None
    try:
        from specvlm.models.attention_kernels import sums_of

        rows_11QD = torch.zeros(1, 1, 2, 16, dtype=dtype, device=device)
        sums_of(rows_11QD, rows_11QD[0], 1.0)
    except Exception:  # no Triton, no compiler for it, or a GPU that it does not know
        return None
    return sums_of


def _by_torch(
    query_HGQD: Tensor, key_HKD: Tensor, scaling: float, first: int = 0, weights_Q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `attention_kernels.sums_of` does with torch's operations, in float32 or, for float64 inputs, float64."""
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
    return heads_HK, last_K, weighted_K
