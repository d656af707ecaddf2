"""Triton kernels that add up the attention of a prompt's last rows, without storing a score.

The scores of 50 rows of a 32B model take 131 MB a layer at 16,384 keys. Torch writes and reads them about six times;
these kernels compute them twice. Sums have a fixed order, so equal rows and keys give equal bits.

Shape suffixes: H KV heads, G query heads per KV head, Q rows of the pass, R = G * Q rows of a KV head (those of one
query head after those of another), K keys, D head dimension, P parts of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

ROWS, KEYS = 64, 128  # of a tile
PART = 1024  # keys of a part, for which a program finds the largest score of each row


@triton.jit
def _scores(q_DR, key_ptr, stride, keys, row, K, count, scaling, BD: tl.constexpr, D: tl.constexpr):
    """Compute scaled scores in float32, shape (keys, rows); -inf for keys that come after a row's own key."""
    dims = tl.arange(0, BD)
    inside = (keys < K)[:, None] & (dims < D)[None, :]
    k_KD = tl.load(key_ptr + keys[:, None].to(tl.int64) * stride + dims[None, :], mask=inside, other=0.0)
    scores = tl.dot(k_KD, q_DR) * scaling
    seen = (keys[:, None] - (K - count) <= (row % count)[None, :]) & (keys < K)[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _queries(q_ptr, row, count, R, group_stride, row_stride, BD: tl.constexpr, D: tl.constexpr):
    """Load the queries of some rows of a KV head, shape (D, rows)."""
    dims = tl.arange(0, BD)
    at = (row // count) * group_stride + (row % count) * row_stride
    return tl.load(q_ptr + at[None, :] + dims[:, None], mask=(row < R)[None, :] & (dims < D)[:, None], other=0.0)


@triton.jit
def _largest_kernel(
    q_ptr, key_ptr, most_ptr, sum_ptr, R, K, count, parts, scaling, q_head, group_stride, row_stride, k_head, k_stride,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store each row's largest score in a part of the keys, and the sum of exp(score - largest) over that part.

    Grid (parts, tiles of rows, heads).
    """
    part, head = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * BR + tl.arange(0, BR)
    q_DR = _queries(q_ptr + head.to(tl.int64) * q_head, row, count, R, group_stride, row_stride, BD, D)
    most = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, K), BK):
        keys = start + tl.arange(0, BK)
        scores = _scores(q_DR, key_ptr + head.to(tl.int64) * k_head, k_stride, keys, row, K, count, scaling, BD, D)
        now = tl.maximum(most, tl.max(scores, 0))
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(scores - shift[None, :]), 0)
        most = now
    at = (head * R + row) * parts + part
    tl.store(most_ptr + at, most, mask=row < R)
    tl.store(sum_ptr + at, total, mask=row < R)


@triton.jit
def _sums_kernel(
    q_ptr, key_ptr, most_ptr, sum_ptr, weight_ptr, all_ptr, last_ptr, weighted_ptr, R, K, count, first, scaling,
    q_head, group_stride, row_stride, k_head, k_stride,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, WEIGH: tl.constexpr,
):  # fmt: skip
    """Add up the attention to each key over a KV head's rows, in three sums. Grid (tiles of keys, heads).

    all: over the rows from `first` on. last: over each query head's last row. weighted: as `all`, each row times its
    weight, if WEIGH is set.
    """
    head = tl.program_id(1)
    keys = tl.program_id(0) * BK + tl.arange(0, BK)
    summed = tl.zeros((BK,), tl.float32)
    last = tl.zeros((BK,), tl.float32)
    weighted = tl.zeros((BK,), tl.float32)
    for start in range(0, R, BR):
        row = start + tl.arange(0, BR)
        q_DR = _queries(q_ptr + head.to(tl.int64) * q_head, row, count, R, group_stride, row_stride, BD, D)
        scores = _scores(q_DR, key_ptr + head.to(tl.int64) * k_head, k_stride, keys, row, K, count, scaling, BD, D)
        most = tl.load(most_ptr + head * R + row, mask=row < R, other=0.0)
        total = tl.load(sum_ptr + head * R + row, mask=row < R, other=1.0)
        read = (row < R) & (row % count >= first)
        shares = tl.where(read[None, :], tl.exp(scores - most[None, :]) / total[None, :], 0.0)
        summed += tl.sum(shares, 1)
        last += tl.sum(tl.where((row % count == count - 1)[None, :], shares, 0.0), 1)
        if WEIGH:
            weight = tl.load(weight_ptr + row % count, mask=row < R, other=0.0)
            weighted += tl.sum(shares * weight[None, :], 1)
    at = head * K + keys
    tl.store(all_ptr + at, summed, mask=keys < K)
    tl.store(last_ptr + at, last, mask=keys < K)
    if WEIGH:
        tl.store(weighted_ptr + at, weighted, mask=keys < K)


def sums_of(
    query_HGQD: Tensor, key_HKD: Tensor, scaling: float, first: int = 0, weights_Q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up attention as `attention_sums` does, but to all keys.

    Returns:
        Sums over rows and query heads (H, K), sums of the last row over all heads (K,), and weighted sums over rows and
        all heads (K,), which are 0 without weights. All in float32.
    """
    heads, group, count, width = query_HGQD.shape
    size, rows = key_HKD.shape[1], group * count
    query_HGQD, key_HKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (query_HGQD, key_HKD))
    parts = triton.cdiv(size, PART)
    most_HRP, total_HRP = query_HGQD.new_empty(2, heads, rows, parts, dtype=torch.float32)
    sums_HK, last_HK, weighted_HK = query_HGQD.new_zeros(3, heads, size, dtype=torch.float32)
    strides = (*query_HGQD.stride()[:3], *key_HKD.stride()[:2])
    tiles = {"D": width, "BD": max(16, triton.next_power_of_2(width)), "BR": ROWS, "BK": KEYS}
    given = query_HGQD, key_HKD
    with device_of(query_HGQD):
        _largest_kernel[(parts, triton.cdiv(rows, ROWS), heads)](
            *given, most_HRP, total_HRP, rows, size, count, parts, scaling, *strides, **tiles, PART=PART
        )
        most_HR = most_HRP.amax(-1)
        total_HR = (total_HRP * (most_HRP - most_HR[..., None]).exp()).sum(-1)
        weights = most_HR if weights_Q is None else weights_Q.to(most_HR).contiguous()
        _sums_kernel[(triton.cdiv(size, KEYS), heads)](
            *given, most_HR, total_HR, weights, sums_HK, last_HK, weighted_HK, rows, size, count, first, scaling, *strides,
            **tiles, WEIGH=weights_Q is not None,
        )  # fmt: skip
    return sums_HK, last_HK.sum(0), weighted_HK.sum(0)
