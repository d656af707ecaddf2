"""Triton kernels for what runs between the matrix products of a vision tower or a prefill: many rows, bound by memory.

A program computes whole rows, in an order that does not depend on their number: a row's bits are the same in any pass.
Values are rounded where Hugging Face's modules round them. Only the order of a norm's sum and `exp` differ, so results
are equal except for a few, which are off by one step of the 16-bit format.

`engine/kernels` has such operations for passes of few rows. They also read and write parts of split sums, or the cache.

Shape suffixes: Q rows, K width of a row, H query heads, J KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

FLAT = 4096  # values that a program of `gate` takes
HEADS = 8  # heads that a program of `turn` takes
# Sums of products are rounded twice, as torch does; a fused multiply-add would round once.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def _norm_kernel(x_ptr, add_ptr, weight_ptr, sum_ptr, y_ptr, K, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Compute y = RMSNorm(x) * weight of a row; with ADD, of sum = x + add, which is stored too. Grid (Q,)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    ok = offs < K
    kind = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * K + offs, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        x = (x + tl.load(add_ptr + row * K + offs, mask=ok, other=0.0).to(tl.float32)).to(kind)
        tl.store(sum_ptr + row * K + offs, x, mask=ok)
        x = x.to(tl.float32)
    scaled = (x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)).to(kind).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * K + offs, (scaled * weight).to(kind), mask=ok)


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, size, BLOCK: tl.constexpr):
    """Replace gate by silu(gate) * up. Grid (blocks,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    kind = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=ok, other=0.0).to(tl.float32)
    active = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(kind).to(tl.float32)
    tl.store(gate_ptr + at, (active * up).to(kind), mask=ok)


@triton.jit
def _turn_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, norm_q, norm_k, q_stride, k_stride, eps,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Rotate some heads of a row of q or k in place. Grid (Q, blocks of query heads + blocks of KV heads).

    NORM: queries and keys go through an RMSNorm of their own first. ROUND: products are rounded before they are added.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    FIRST: tl.constexpr = (H + HEADS - 1) // HEADS  # blocks of query heads
    heads, weight, count = q_ptr + row * q_stride, norm_q, H
    if block >= FIRST:
        heads, weight, count = k_ptr + row * k_stride, norm_k, J
        block -= FIRST
    kind = q_ptr.dtype.element_ty
    head = block * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    inside = d < HALF
    ok = (head < count)[:, None] & inside[None, :]
    at = heads + head[:, None] * D + d[None, :]
    low = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
        w_low = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        w_high = tl.load(weight + HALF + d, mask=inside, other=0.0).to(tl.float32)
        low = ((low * scale).to(kind).to(tl.float32) * w_low[None, :]).to(kind).to(tl.float32)
        high = ((high * scale).to(kind).to(tl.float32) * w_high[None, :]).to(kind).to(tl.float32)
    turn = row * D + d
    cos = tl.load(cos_ptr + turn, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + turn, mask=inside, other=0.0).to(tl.float32)[None, :]
    far_cos = tl.load(cos_ptr + turn + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    far_sin = tl.load(sin_ptr + turn + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    near, from_high, far, from_low = low * cos, high * sin, high * far_cos, low * far_sin
    if ROUND:
        near, from_high = near.to(kind).to(tl.float32), from_high.to(kind).to(tl.float32)
        far, from_low = far.to(kind).to(tl.float32), from_low.to(kind).to(tl.float32)
    tl.store(at, (near - from_high).to(kind), mask=ok)
    tl.store(at + HALF, (far + from_low).to(kind), mask=ok)


def norm(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of the last axis, times the weight."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _normed(x, None, weight_K, eps, x, y)
    return y


def add_norm(x: Tensor, added: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum x + added, as a new tensor, and the RMSNorm of the sum times the weight."""
    x, added = x.contiguous(), added.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    _normed(x, added, weight_K, eps, total, y)
    return total, y


def _normed(x: Tensor, added: Tensor | None, weight_K: Tensor, eps: float, total: Tensor, y: Tensor) -> None:
    width = weight_K.numel()
    block = triton.next_power_of_2(width)
    with device_of(x):
        _norm_kernel[(x.numel() // width,)](
            x, x if added is None else added, weight_K, total, y, width, eps,
            ADD=added is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)), **OPTIONS,
        )  # fmt: skip


def gate(gate_QK: Tensor, up_QK: Tensor) -> Tensor:
    """Write silu(gate) * up into `gate` and return it. Both are contiguous."""
    size = gate_QK.numel()
    with device_of(gate_QK):
        _gate_kernel[(triton.cdiv(size, FLAT),)](gate_QK, up_QK, size, BLOCK=FLAT, num_warps=8, **OPTIONS)
    return gate_QK


def turn(
    q_QHD: Tensor, k_QJD: Tensor, cos_QD: Tensor, sin_QD: Tensor, rounded: bool, norms: Sequence[Tensor] = (), eps: float = 0.0
) -> None:
    """Rotate queries and keys in place. In memory, the heads of a row follow each other without gaps.

    Args:
        q_QHD: Queries.
        k_QJD: Keys.
        cos_QD: Cosines of each row's angles; the two halves belong to the two halves of a head.
        sin_QD: Sines.
        rounded: Whether products are rounded to the dtype of the queries before they are added.
        norms: Weights (D,) of the RMSNorm of each query and of each key, if the model has them.
        eps: Epsilon of these norms.
    """
    (rows, heads, width), kv_heads = q_QHD.shape, k_QJD.shape[1]
    blocks = triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    with device_of(q_QHD):
        _turn_kernel[(rows, blocks)](
            q_QHD, k_QJD, cos_QD.contiguous(), sin_QD.contiguous(), *(norms or (q_QHD, q_QHD)),
            q_QHD.stride(0), k_QJD.stride(0), eps, H=heads, J=kv_heads, D=width, HEADS=HEADS,
            BLOCK=triton.next_power_of_2(width // 2), NORM=bool(norms), ROUND=rounded, num_warps=2, **OPTIONS,
        )  # fmt: skip
