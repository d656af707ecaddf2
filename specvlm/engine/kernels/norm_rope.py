"""Residual adds, RMSNorm and rotary embedding, between the linear layers. Shape suffixes: see the package docstring."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.contexts import Contexts
from specvlm.engine.kernels.launch import GROUP, Narrow, Tile, context_of, options_of, split, to_8_bits


@triton.jit
def store_normed(
    x, weight, sum_ptr, y_ptr, ys_ptr, row, offs, ok, K, eps,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Store a row x to sum, and its RMSNorm times weight to y.

    NARROW: store y in 8 bits, with a scale per GROUP values.
    """
    kind = sum_ptr.dtype.element_ty
    tl.store(sum_ptr + row * K + offs, x.to(kind), mask=ok)
    scaled = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    y = (scaled.to(kind).to(tl.float32) * weight.to(tl.float32)).to(kind)
    if NARROW:
        groups = tl.trans(tl.reshape(y.to(tl.float32), (BLOCK // GROUP, GROUP)))
        narrow, scale = to_8_bits(groups, y_ptr)
        tl.store(y_ptr + row * K + offs, tl.reshape(tl.trans(narrow), (BLOCK,)), mask=ok)
        at = tl.arange(0, BLOCK // GROUP)
        tl.store(ys_ptr + row * (K // GROUP) + at, scale, mask=at < K // GROUP)
    else:
        tl.store(y_ptr + row * K + offs, y, mask=ok)


@triton.jit
def _add_norm_kernel(
    x_ptr, part_ptr, weight_ptr, sum_ptr, y_ptr, ys_ptr, Q, K, eps,
    S: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute sum = x + (the S parts of a linear layer's output, or none) and y = RMSNorm(sum) * weight. Grid (Q,)."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    ok = offs < K
    weight = tl.load(weight_ptr + offs, mask=ok, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kind = sum_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * K + offs, mask=ok, other=0.0).to(tl.float32)
    if S > 0:
        added = tl.zeros((BLOCK,), dtype=tl.float32)
        for s in tl.static_range(S):
            added += tl.load(part_ptr + (s * Q + row) * K + offs, mask=ok, other=0.0)
        x = (x + added.to(kind).to(tl.float32)).to(kind).to(tl.float32)
    store_normed(x, weight, sum_ptr, y_ptr, ys_ptr, row, offs, ok, K, eps, BLOCK, GROUP, NARROW)


@triton.jit
def _whole_kernel(part_ptr, y_ptr, size, S: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Sum S parts of `size` values each, then round. Grid (blocks,)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = offs < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(S):
        y += tl.load(part_ptr + s * size + offs, mask=ok, other=0.0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["layer"])
def _rope_kernel(
    part_ptr, b0, b1, b2, norm_q, norm_k, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, base_ptr, request_ptr, local_ptr,
    at, layer, Q, capacity, eps,
    S: tl.constexpr, H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, MANY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum the S parts of queries, keys and values, and rotate queries and keys. Grid (Q, H + 2 J).

    Queries go to q (Q, H, D), keys and values to cache slots base + at + row.

    BIAS: add the biases b0, b1 and b2 of queries, keys and values. NORM: queries and keys go through an RMSNorm with
    the weights norm_q and norm_k before they are rotated. MANY: the rows belong to several requests, and each writes to
    the cache of its own. base_ptr is then `Contexts.table_B4`, and k_ptr and v_ptr are `Contexts.anchor`.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK)
    ok = d < HALF
    n = (H + 2 * J) * D
    kind = q_ptr.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(S):
        source = part_ptr + (s * Q + row).to(tl.int64) * n + head * D + d
        low += tl.load(source, mask=ok, other=0.0)
        high += tl.load(source + HALF, mask=ok, other=0.0)
    if BIAS:
        bias = b0 + head * D + d
        if head >= H:
            bias = b1 + (head - H) * D + d
        if head >= H + J:
            bias = b2 + (head - H - J) * D + d
        low += tl.load(bias, mask=ok, other=0.0).to(tl.float32)
        high += tl.load(bias + HALF, mask=ok, other=0.0).to(tl.float32)
    low = low.to(kind).to(tl.float32)
    high = high.to(kind).to(tl.float32)
    if head < H + J:
        if NORM:
            weight = norm_q + d
            if head >= H:
                weight = norm_k + d
            scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / D + eps)
            low = (low * scale).to(kind).to(tl.float32) * tl.load(weight, mask=ok, other=0.0).to(tl.float32)
            high = (high * scale).to(kind).to(tl.float32) * tl.load(weight + HALF, mask=ok, other=0.0).to(tl.float32)
            low = low.to(kind).to(tl.float32)
            high = high.to(kind).to(tl.float32)
        cos = tl.load(cos_ptr + row * HALF + d, mask=ok, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * HALF + d, mask=ok, other=0.0).to(tl.float32)
        # Each product is rounded before the sum, as in the Hugging Face layer.
        turned = (low * cos).to(kind).to(tl.float32) - (high * sin).to(kind).to(tl.float32)
        high = (high * cos).to(kind).to(tl.float32) + (low * sin).to(kind).to(tl.float32)
        low = turned
    if head < H:
        to = q_ptr + (row * H + head) * D + d
    else:
        kv_head = (head - H) % J
        if MANY:
            request = tl.load(request_ptr + row)
            ok = ok & (request >= 0)  # padding writes nothing
            keys, values, base, slots = context_of(base_ptr, k_ptr, v_ptr, tl.maximum(request, 0), layer, J, D)
            slot = kv_head * slots + base + tl.load(local_ptr + row).to(tl.int32)
        else:
            keys, values = k_ptr, v_ptr
            slot = kv_head * capacity + tl.load(base_ptr) + at + row
        to = keys
        if head >= H + J:
            to = values
        to += slot.to(tl.int64) * D + d
    tl.store(to, low.to(kind), mask=ok)
    tl.store(to + HALF, high.to(kind), mask=ok)


def add_norm(
    x_QK: Tensor, parts_SQK: Tensor | None, weight_K: Tensor, eps: float, kind: str = "full"
) -> tuple[Tensor, Tensor | Narrow]:
    """Compute sum = x + (the sum of the parts, if any) and y = RMSNorm(sum) * weight, both (Q, K)."""
    rows, width = x_QK.shape
    total = torch.empty_like(x_QK)
    y = torch.empty_like(x_QK) if kind == "full" else Narrow.empty(rows, width, kind, x_QK.device)
    _add_norm_kernel[(rows,)](
        x_QK, x_QK if parts_SQK is None else parts_SQK, weight_K, total, *split(y), rows, width, eps,
        S=0 if parts_SQK is None else len(parts_SQK), BLOCK=triton.next_power_of_2(width), GROUP=GROUP,
        NARROW=kind != "full", **options_of(Tile(warps=16)),
    )  # fmt: skip
    return total, y


def whole(parts_SQN: Tensor, out_QN: Tensor) -> Tensor:
    """Sum a linear layer's parts into `out`, rounded once."""
    count, block = len(parts_SQN), 2048
    _whole_kernel[(triton.cdiv(out_QN.numel(), block),)](
        parts_SQN, out_QN, out_QN.numel(), S=count, BLOCK=block, **options_of(Tile(warps=8))
    )
    return out_QN


def rope(
    parts_SQN: Tensor, biases: tuple[Tensor, ...], cos_QD: Tensor, sin_QD: Tensor,
    keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, at: int, heads: int,
    norms: tuple[Tensor, ...] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return (Q, H, D) rotated queries; write keys and values to cache slots base + at + row.

    cos, sin: (Q, D/2). base: (1,) on the device. norms: weights (D,) of the RMSNorm of each query and of each key, if
    the model has them.
    """
    kv_heads, capacity, _ = keys_JCD.shape
    where = (keys_JCD, values_JCD, base, base, base, at, 0)
    return _rope(parts_SQN, biases, cos_QD, sin_QD, where, capacity, heads, kv_heads, norms, eps, many=False)


def rope_many(
    parts_SQN: Tensor, biases: tuple[Tensor, ...], cos_QD: Tensor, sin_QD: Tensor, contexts: Contexts, layer: int, heads: int,
    norms: tuple[Tensor, ...] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Like `rope`, but for rows of several requests, each of which writes to `layer` of its own cache."""
    layout, anchor = contexts.layout, contexts.anchor
    where = (anchor, anchor, contexts.table_B4, layout.request_Q, layout.local_Q, 0, layer)
    return _rope(parts_SQN, biases, cos_QD, sin_QD, where, 0, heads, contexts.kv_heads, norms, eps, many=True)


def _rope(
    parts_SQN: Tensor, biases: tuple[Tensor, ...], cos_QD: Tensor, sin_QD: Tensor, where: tuple[Any, ...], capacity: int,
    heads: int, kv_heads: int, norms: tuple[Tensor, ...], eps: float, many: bool,
) -> Tensor:  # fmt: skip
    """Launch the kernel. where: its arguments from k_ptr to layer."""
    rows, width = parts_SQN.shape[1], cos_QD.shape[1] * 2
    q = torch.empty(rows, heads, width, dtype=where[0].dtype, device=parts_SQN.device)
    three = biases if biases else (q, q, q)
    _rope_kernel[(rows, heads + 2 * kv_heads)](
        parts_SQN, *three, *(norms or (q, q)), cos_QD, sin_QD, q, *where, rows, capacity, eps,
        S=len(parts_SQN), H=heads, J=kv_heads, D=width, BLOCK=triton.next_power_of_2(width // 2), BIAS=bool(biases),
        NORM=bool(norms), MANY=many, **options_of(Tile(warps=1)),
    )  # fmt: skip
    return q
