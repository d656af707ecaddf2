"""Triton kernels for passes of few rows, where a step costs the bytes of the weights and the keys it reads.

Every kernel may be captured in a CUDA graph: what changes from pass to pass (the length of the prefix) is read from
the device. With `PDL` a kernel may be scheduled before its predecessor has ended (programmatic dependent launch, CUDA
12): each waits for it before reading what it wrote, so the order of memory is that of the stream.

Shape suffixes: Q rows, K inputs, N outputs, S parts of a split sum, H query heads, J KV heads, G = H / J, D head width,
C slots of a cache, T rows of the tree, V vocabulary.

The plain forms of the same functions, which the tests compare with, are in `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.ops import Weight

PDL = True  # off in Triton's interpreter, which knows no such launch


# ---- linear layers of few rows ----------------------------------------------------------------------------------------


@triton.jit
def _prefetch(w_ptr, offs_n, k0, stride, N, BYTES: tl.constexpr, BK: tl.constexpr):
    """Ask the L2 cache for a weight tile, which no earlier kernel writes, while that kernel is still running."""
    LINES: tl.constexpr = (BK * BYTES + 127) // 128
    lines = tl.arange(0, LINES) * (128 // BYTES)
    addresses = (w_ptr + offs_n[:, None].to(tl.int64) * stride + k0 + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _dot_rows(
    x_ptr, w_ptr, scale_ptr, offs_n, offs_q, Q, N, K, k_lo, k_hi,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(BN, BQ) float32 of w (N, K) times x (Q, K) over k_lo..k_hi; weights stand first, so that they fill the tensor cores.

    Whole tiles only: k_hi - k_lo is a multiple of BK, and of a group of weights in 4 bits, BK is a divisor.
    """
    offs_k = tl.arange(0, BK)
    rows_q = (offs_q < Q)[None, :]
    rows_n = offs_n < N
    acc = tl.zeros((BN, BQ), dtype=tl.float32)
    if KIND == "int4":
        half = K // 2
        for k in range(k_lo, k_hi, BK):
            packed = tl.load(
                w_ptr + offs_n[:, None].to(tl.int64) * half + (k + offs_k)[None, :],
                mask=rows_n[:, None], other=136, eviction_policy="evict_first",
            )  # fmt: skip
            x_at = x_ptr + offs_q[None, :] * K + (k + offs_k)[:, None]
            x_ok = rows_q
            x_low = tl.load(x_at, mask=x_ok, other=0.0)
            x_high = tl.load(x_at + half, mask=x_ok, other=0.0)
            low = ((packed & 15).to(tl.int8) - 8).to(x_low.dtype)
            high = ((packed >> 4).to(tl.int8) - 8).to(x_low.dtype)
            groups = K // GROUP
            s_at = scale_ptr + offs_n * groups + k // GROUP
            s_low = tl.load(s_at, mask=rows_n, other=0.0)
            s_high = tl.load(s_at + groups // 2, mask=rows_n, other=0.0)
            acc += tl.dot(low, x_low) * s_low[:, None] + tl.dot(high, x_high) * s_high[:, None]
    else:
        for k in range(k_lo, k_hi, BK):
            w = tl.load(
                w_ptr + offs_n[:, None].to(tl.int64) * K + (k + offs_k)[None, :],
                mask=rows_n[:, None], other=0.0, eviction_policy="evict_first",
            )  # fmt: skip
            x = tl.load(x_ptr + offs_q[None, :] * K + (k + offs_k)[:, None], mask=rows_q, other=0.0)
            acc = tl.dot(w.to(x.dtype), x, acc)
        if KIND != "full":
            acc *= tl.load(scale_ptr + offs_n, mask=rows_n, other=0.0)[:, None]
    return acc


@triton.jit
def _rows_kernel(
    x_ptr, w0, w1, w2, s0, s1, s2, y_ptr, Q, N0, N1, N2, K, CHUNK,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (S, Q, N0+N1+N2): part s of the sum over k, of up to three weights that share their input. Grid (tiles, S)."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    t0 = tl.cdiv(N0, BN)
    t1 = tl.cdiv(N1, BN)
    w, s, first, N, shift = w0, s0, tile, N0, 0
    if tile >= t0:
        w, s, first, N, shift = w1, s1, tile - t0, N1, N0
    if tile >= t0 + t1:
        w, s, first, N, shift = w2, s2, tile - t0 - t1, N2, N0 + N1
    offs_n = first * BN + tl.arange(0, BN)
    offs_q = tl.arange(0, BQ)
    k_lo = part * CHUNK
    k_hi = tl.minimum(k_lo + CHUNK, WIDTH)
    if PDL:
        if first * BN + BN <= N and k_lo + BK <= k_hi:
            _prefetch(w, offs_n, k_lo, WIDTH, N, BYTES, BK)
        gdc_wait()
    acc = _dot_rows(x_ptr, w, s, offs_n, offs_q, Q, N, K, k_lo, k_hi, BQ, BN, BK, KIND, GROUP)
    if PDL:
        gdc_launch_dependents()
    at = y_ptr + (part * Q + offs_q)[None, :].to(tl.int64) * (N0 + N1 + N2) + (shift + offs_n)[:, None]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_q < Q)[None, :])


@triton.jit
def _gated_kernel(
    x_ptr, gate, up, gate_s, up_s, y_ptr, Q, N, K,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (Q, N) = silu(x gate^T) * (x up^T), each rounded as the Hugging Face layer rounds it. Grid (tiles,)."""
    offs_n = tl.program_id(0) * BN + tl.arange(0, BN)
    offs_q = tl.arange(0, BQ)
    offs_k = tl.arange(0, BK)
    if PDL:
        if tl.program_id(0) * BN + BN <= N:
            _prefetch(gate, offs_n, 0, WIDTH, N, BYTES, BK)
            _prefetch(up, offs_n, 0, WIDTH, N, BYTES, BK)
        gdc_wait()
    kind = y_ptr.dtype.element_ty
    if KIND == "int4":
        g = _dot_rows(x_ptr, gate, gate_s, offs_n, offs_q, Q, N, K, 0, WIDTH, BQ, BN, BK, KIND, GROUP)
        u = _dot_rows(x_ptr, up, up_s, offs_n, offs_q, Q, N, K, 0, WIDTH, BQ, BN, BK, KIND, GROUP)
    else:  # one loop over both, so that x is read once
        rows_n = offs_n < N
        g = tl.zeros((BN, BQ), dtype=tl.float32)
        u = tl.zeros((BN, BQ), dtype=tl.float32)
        for k in range(0, WIDTH, BK):
            w_at = offs_n[:, None].to(tl.int64) * K + (k + offs_k)[None, :]
            x_at = offs_q[None, :] * K + (k + offs_k)[:, None]
            x = tl.load(x_ptr + x_at, mask=(offs_q < Q)[None, :], other=0.0)
            w_g = tl.load(gate + w_at, mask=rows_n[:, None], other=0.0, eviction_policy="evict_first")
            w_u = tl.load(up + w_at, mask=rows_n[:, None], other=0.0, eviction_policy="evict_first")
            g = tl.dot(w_g.to(x.dtype), x, g)
            u = tl.dot(w_u.to(x.dtype), x, u)
        if KIND != "full":
            g *= tl.load(gate_s + offs_n, mask=rows_n, other=0.0)[:, None]
            u *= tl.load(up_s + offs_n, mask=rows_n, other=0.0)[:, None]
    if PDL:
        gdc_launch_dependents()
    g = g.to(kind).to(tl.float32)
    u = u.to(kind).to(tl.float32)
    gated = (g * tl.sigmoid(g)).to(kind).to(tl.float32) * u
    at = y_ptr + offs_q[None, :].to(tl.int64) * N + offs_n[:, None]
    tl.store(at, gated.to(kind), mask=(offs_n < N)[:, None] & (offs_q < Q)[None, :])


# ---- what stands between the linear layers ----------------------------------------------------------------------------


@triton.jit
def _add_norm_kernel(
    x_ptr, part_ptr, weight_ptr, sum_ptr, y_ptr, Q, K, eps, S: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """sum = x + (the S parts of a linear layer's output); y = RMSNorm(sum) * weight. Grid (Q,)."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    ok = offs < K
    weight = tl.load(weight_ptr + offs, mask=ok, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    kind = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * K + offs, mask=ok, other=0.0).to(tl.float32)
    if S > 0:
        added = tl.zeros((BLOCK,), dtype=tl.float32)
        for s in tl.static_range(S):
            added += tl.load(part_ptr + (s * Q + row) * K + offs, mask=ok, other=0.0)
        x = (x + added.to(kind).to(tl.float32)).to(kind).to(tl.float32)
    tl.store(sum_ptr + row * K + offs, x.to(kind), mask=ok)
    scaled = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    tl.store(y_ptr + row * K + offs, (scaled.to(kind).to(tl.float32) * weight.to(tl.float32)).to(kind), mask=ok)


@triton.jit
def _rope_kernel(
    part_ptr, b0, b1, b2, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, base_ptr, at, Q, capacity,
    S: tl.constexpr, H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries turned into q (Q, H, D); keys turned, and values, into the slots base + at + row. Grid (Q, H + 2 J)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    n = (H + 2 * J) * D
    kind = q_ptr.dtype.element_ty
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    low = tl.zeros((HALF,), dtype=tl.float32)
    high = tl.zeros((HALF,), dtype=tl.float32)
    for s in tl.static_range(S):
        source = part_ptr + (s * Q + row).to(tl.int64) * n + head * D + d
        low += tl.load(source)
        high += tl.load(source + HALF)
    if BIAS:
        bias = b0 + head * D + d
        if head >= H:
            bias = b1 + (head - H) * D + d
        if head >= H + J:
            bias = b2 + (head - H - J) * D + d
        low += tl.load(bias).to(tl.float32)
        high += tl.load(bias + HALF).to(tl.float32)
    low = low.to(kind).to(tl.float32)
    high = high.to(kind).to(tl.float32)
    if head < H + J:
        cos = tl.load(cos_ptr + row * HALF + d).to(tl.float32)
        sin = tl.load(sin_ptr + row * HALF + d).to(tl.float32)
        # Each product is rounded before the sum, as in the Hugging Face layer.
        turned = (low * cos).to(kind).to(tl.float32) - (high * sin).to(kind).to(tl.float32)
        high = (high * cos).to(kind).to(tl.float32) + (low * sin).to(kind).to(tl.float32)
        low = turned
    slot = tl.load(base_ptr) + at + row
    if head < H:
        to = q_ptr + (row * H + head) * D + d
    else:
        if head < H + J:
            to = k_ptr + ((head - H) * capacity + slot).to(tl.int64) * D + d
        else:
            to = v_ptr + ((head - H - J) * capacity + slot).to(tl.int64) * D + d
    tl.store(to, low.to(kind))
    tl.store(to + HALF, high.to(kind))


# ---- attention of few rows over a long prefix and a small tree ----------------------------------------------------------


@triton.jit
def _attend_tile(q, k, v, seen, m, l, acc, scale, IEEE: tl.constexpr):
    """One tile of keys into the running maximum m, sum l and weighted values acc of an online softmax, base 2."""
    if IEEE:
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    else:
        score = tl.dot(q, tl.trans(k)) * scale
    score = tl.where(seen, score, float("-inf"))
    top = tl.maximum(m, tl.max(score, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet
    weight = tl.exp2(score - safe[:, None])
    shrink = tl.exp2(m - safe)
    l = l * shrink + tl.sum(weight, 1)
    if IEEE:
        acc = tl.dot(weight, v, acc * shrink[:, None], input_precision="ieee")
    else:
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
    return top, l, acc


@triton.jit
def _store_rows(out_ptr, lse_ptr, offs_r, rows, at, m, l, acc, D: tl.constexpr):
    d = tl.arange(0, D)
    ok = offs_r < rows
    safe = tl.where(l > 0, l, 1.0)
    tl.store(out_ptr + (at + offs_r)[:, None].to(tl.int64) * D + d[None, :], acc / safe[:, None], mask=ok[:, None])
    tl.store(lse_ptr + at + offs_r, m + tl.log2(safe), mask=ok)  # -inf where nothing was seen


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr, base_ptr, out_ptr, lse_ptr, Q, T, capacity, scale,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BN: tl.constexpr,
    IEEE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax over one part of the keys for all rows of one KV head's queries. Grid (J, parts, row blocks).

    The Q x G rows of a KV head are R1 rows and, where that fits them better than one larger power of two, R2 more.
    Parts are equal shares of the `base` slots of the prefix; the last part also takes the T slots of the tree.
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    G: tl.constexpr = H // J
    rows = Q * G
    first = tl.program_id(2) * (R1 + R2)
    d = tl.arange(0, D)
    offs_n = tl.arange(0, BN)
    r1 = first + tl.arange(0, R1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    base = tl.load(base_ptr).to(tl.int32)
    share = tl.cdiv(tl.cdiv(base, parts), BN) * BN
    lo = tl.minimum(part * share, base)
    hi = tl.minimum(lo + share, base)
    k_ptr += head.to(tl.int64) * capacity * D
    v_ptr += head.to(tl.int64) * capacity * D
    # Row r of a KV head is row r // G of the pass, query head head * G + r % G.
    q1 = tl.load(
        q_ptr + ((r1 // G) * H + head * G + r1 % G)[:, None] * D + d[None, :], mask=(r1 < rows)[:, None], other=0.0
    )
    m1 = tl.full((R1,), float("-inf"), dtype=tl.float32)
    l1 = tl.zeros((R1,), dtype=tl.float32)
    acc1 = tl.zeros((R1, D), dtype=tl.float32)
    if R2 > 0:
        r2 = first + R1 + tl.arange(0, R2)
        q2 = tl.load(
            q_ptr + ((r2 // G) * H + head * G + r2 % G)[:, None] * D + d[None, :], mask=(r2 < rows)[:, None], other=0.0
        )
        m2 = tl.full((R2,), float("-inf"), dtype=tl.float32)
        l2 = tl.zeros((R2,), dtype=tl.float32)
        acc2 = tl.zeros((R2, D), dtype=tl.float32)
    for start in range(lo, hi, BN):
        slots = start + offs_n
        inside = slots < hi
        at = slots[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
        m1, l1, acc1 = _attend_tile(q1, k, v, inside[None, :], m1, l1, acc1, scale, IEEE)
        if R2 > 0:
            m2, l2, acc2 = _attend_tile(q2, k, v, inside[None, :], m2, l2, acc2, scale, IEEE)
    if part == parts - 1:
        for start in range(0, T, BN):
            nodes = start + offs_n
            inside = nodes < T
            at = (base + nodes)[:, None] * D + d[None, :]
            k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)
            v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
            seen1 = tl.load(
                seen_ptr + (r1 // G)[:, None] * T + nodes[None, :], mask=(r1 < rows)[:, None] & inside[None, :], other=0
            )
            m1, l1, acc1 = _attend_tile(q1, k, v, seen1 != 0, m1, l1, acc1, scale, IEEE)
            if R2 > 0:
                seen2 = tl.load(
                    seen_ptr + (r2 // G)[:, None] * T + nodes[None, :], mask=(r2 < rows)[:, None] & inside[None, :], other=0
                )
                m2, l2, acc2 = _attend_tile(q2, k, v, seen2 != 0, m2, l2, acc2, scale, IEEE)
    at = (part * J + head) * rows
    _store_rows(out_ptr, lse_ptr, r1, rows, at, m1, l1, acc1, D)
    if R2 > 0:
        _store_rows(out_ptr, lse_ptr, r2, rows, at, m2, l2, acc2, D)


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, y_ptr, Q, S, H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, PDL: tl.constexpr
):
    """The S parts of an attention into one, by their log-sum-exp (base 2). Grid (Q, H)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    G: tl.constexpr = H // J
    d = tl.arange(0, D)
    s = tl.arange(0, BS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = (s * J + head // G) * (Q * G) + row * G + head % G
    lse = tl.load(lse_ptr + at, mask=s < S, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    part = tl.load(part_ptr + at[:, None].to(tl.int64) * D + d[None, :], mask=(s < S)[:, None], other=0.0)
    y = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(y_ptr + (row * H + head) * D + d, y.to(y_ptr.dtype.element_ty))


# ---- the best tokens of a row -----------------------------------------------------------------------------------------


@triton.jit
def _top_kernel(
    x_ptr, value_ptr, index_ptr, V, stride, from_ptr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The COUNT largest of a block of a row, largest first, equal ones by their index. Grid (Q, blocks).

    NESTED: x holds the winners of blocks, and from_ptr their indices in the row.
    """
    row = tl.program_id(0)
    block = tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    ok = offs < V
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row.to(tl.int64) * stride + offs, mask=ok, other=float("-inf")).to(tl.float32)
    index = offs
    if NESTED:
        index = tl.load(from_ptr + row.to(tl.int64) * stride + offs, mask=ok, other=2147483647)
    out = (row * tl.num_programs(1) + block) * COUNT
    left = ok
    for i in tl.static_range(COUNT):
        best = tl.max(tl.where(left, x, float("-inf")), 0)
        chosen = tl.min(tl.where(left & (x == best), index, 2147483647), 0)
        tl.store(value_ptr + out + i, best)
        tl.store(index_ptr + out + i, chosen)
        left = left & (index != chosen)


# ---- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How a linear layer of few rows is cut: outputs and inputs of a tile, tiles in flight, warps of a program."""

    outputs: int = 64
    inputs: int = 128
    stages: int = 4
    warps: int = 4


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "PDL": PDL, **({"launch_pdl": True} if PDL else {})}


def _width(rows: int) -> int:
    """Rows as the tensor cores take them."""
    return max(16, triton.next_power_of_2(rows))


def tile_of(weight: Weight, rows: int) -> Tile:
    """By measurement on an H200 (see experiments/gpu_pair): enough bytes in flight for its memory."""
    return Tile()


def parts_of(weights: tuple[Weight, ...], tile: Tile, device: torch.device) -> int:
    """Parts of a sum over k, so that tiles of few outputs still fill the device. The same for any number of rows."""
    tiles = sum(triton.cdiv(w.outputs, tile.outputs) for w in weights)
    steps = _stored(weights[0]) // tile.inputs
    return max(1, min(round(2.5 * _processors(device) / tiles), steps // 4))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _stored(weight: Weight) -> int:
    """Elements of a row of the stored matrix."""
    return weight.data.shape[1]


def _fitting(weight: Weight, tile: Tile) -> Tile:
    """The tile, its inputs cut to a divisor of the row (and of a group of weights in 4 bits)."""
    step = min(tile.inputs, weight.group) if weight.kind == "int4" else tile.inputs
    while _stored(weight) % step:
        step //= 2
    return replace(tile, inputs=step)


def linear(
    x_QK: Tensor, weights: tuple[Weight, ...], whole: bool = False, tile: Tile | None = None, parts: int = 0
) -> Tensor:
    """(S, Q, N) float32: x times one to three weights side by side, as S sums over shares of k; whole: (1, Q, N) as x is."""
    rows, inputs = x_QK.shape
    first, last = weights[0], weights[-1]
    tile = _fitting(first, tile or tile_of(first, rows))
    parts = 1 if whole else parts or parts_of(weights, tile, x_QK.device)
    sizes = [w.outputs for w in weights] + [0] * (3 - len(weights))
    three = (*weights, last, last)[:3]
    stored = _stored(first)
    chunk = triton.cdiv(triton.cdiv(stored, parts), tile.inputs) * tile.inputs
    y = torch.empty(parts, rows, sum(sizes), dtype=x_QK.dtype if whole else torch.float32, device=x_QK.device)
    tiles = sum(triton.cdiv(n, tile.outputs) for n in sizes)
    _rows_kernel[(tiles, parts)](
        x_QK, *(w.data for w in three), *(w.scale for w in three), y, rows, *sizes, inputs, chunk,
        BQ=_width(rows), BN=tile.outputs, BK=tile.inputs, KIND=first.kind, GROUP=first.group,
        BYTES=first.data.element_size(), WIDTH=stored, **_options(tile),
    )  # fmt: skip
    return y


def gated(x_QK: Tensor, gate: Weight, up: Weight, tile: Tile | None = None) -> Tensor:
    """(Q, N): silu(x gate^T) * (x up^T)."""
    rows, inputs = x_QK.shape
    tile = _fitting(gate, tile or tile_of(gate, rows))
    y = torch.empty(rows, gate.outputs, dtype=x_QK.dtype, device=x_QK.device)
    _gated_kernel[(triton.cdiv(gate.outputs, tile.outputs),)](
        x_QK, gate.data, up.data, gate.scale, up.scale, y, rows, gate.outputs, inputs,
        BQ=_width(rows), BN=tile.outputs, BK=tile.inputs, KIND=gate.kind, GROUP=gate.group,
        BYTES=gate.data.element_size(), WIDTH=_stored(gate), **_options(tile),
    )  # fmt: skip
    return y


def add_norm(x_QK: Tensor, parts_SQK: Tensor | None, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + sum of parts, its RMSNorm times weight), both (Q, K)."""
    rows, width = x_QK.shape
    total, y = torch.empty_like(x_QK), torch.empty_like(x_QK)
    _add_norm_kernel[(rows,)](
        x_QK, x_QK if parts_SQK is None else parts_SQK, weight_K, total, y, rows, width, eps,
        S=0 if parts_SQK is None else len(parts_SQK), BLOCK=triton.next_power_of_2(width), **_options(Tile(warps=16)),
    )  # fmt: skip
    return total, y


def rope(
    parts_SQN: Tensor, biases: tuple[Tensor, ...], cos_QD: Tensor, sin_QD: Tensor,
    keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, at: int, heads: int,
) -> Tensor:  # fmt: skip
    """(Q, H, D) rotated queries; keys and values go to the cache. cos and sin: (Q, D/2). base: one integer on the device."""
    kv_heads, capacity, width = keys_JCD.shape
    rows = parts_SQN.shape[1]
    q = torch.empty(rows, heads, width, dtype=keys_JCD.dtype, device=keys_JCD.device)
    three = biases if biases else (q, q, q)
    _rope_kernel[(rows, heads + 2 * kv_heads)](
        parts_SQN, *three, cos_QD, sin_QD, q, keys_JCD, values_JCD, base, at, rows, capacity,
        S=len(parts_SQN), H=heads, J=kv_heads, D=width, BIAS=bool(biases), **_options(Tile(warps=1)),
    )  # fmt: skip
    return q


def row_blocks(rows: int) -> tuple[int, int, int]:
    """(R1, R2, blocks): two powers of two that hold the rows of a KV head with least padding, 256 rows a block."""
    blocks = triton.cdiv(rows, 256)
    rows = triton.cdiv(rows, blocks)
    whole = max(16, triton.next_power_of_2(rows))
    if whole > 16 and rows > whole // 2:
        rest = max(16, triton.next_power_of_2(rows - whole // 2))
        if rest < whole // 2:
            return whole // 2, rest, blocks
    return (whole, 0, blocks) if whole <= 128 else (128, 128, blocks)


def attention(
    q_QHD: Tensor, keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, seen_QT: Tensor, scale: float,
    parts: int = 0, bn: int = 64, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """(Q, H, D): each row over the first `base` slots and those of the next T that seen (int8) marks. Source: flash
    decoding with a tree mask on its tail; softmax in base 2, parts merged by log-sum-exp. parts 0: by the device.
    """
    rows, heads, width = q_QHD.shape
    kv_heads, capacity, _ = keys_JCD.shape
    group_rows = rows * (heads // kv_heads)
    r1, r2, blocks = row_blocks(group_rows)
    if not parts:
        parts = split_of(kv_heads * blocks, group_rows, q_QHD.device)
    device = q_QHD.device
    part = torch.empty(parts, kv_heads, group_rows, width, dtype=torch.float32, device=device)
    lse = torch.empty(parts, kv_heads, group_rows, dtype=torch.float32, device=device)
    tile = tile or Tile(warps=8 if r1 + r2 > 64 else 4, stages=3)
    _attention_kernel[(kv_heads, parts, blocks)](
        q_QHD, keys_JCD, values_JCD, seen_QT, base, part, lse, rows, seen_QT.shape[1], capacity, scale * 1.4426950408889634,
        H=heads, J=kv_heads, D=width, R1=r1, R2=r2, BN=bn, IEEE=q_QHD.dtype == torch.float32,
        **_options(tile),
    )  # fmt: skip
    y = torch.empty_like(q_QHD)
    _merge_kernel[(rows, heads)](
        part, lse, y, rows, parts, H=heads, J=kv_heads, D=width, BS=triton.next_power_of_2(parts), **_options(Tile(warps=2))
    )
    return y


def split_of(programs: int, rows: int, device: torch.device) -> int:
    """Parts of the keys: enough programs to fill the device, once where a part's result is large, else four times."""
    return max(1, _processors(device) * (1 if rows > 64 else 4) // programs)


def top(logits_QV: Tensor, count: int) -> Tensor:
    """(Q, count) int64: the tokens of the largest logits, largest first, equal ones by their number."""
    rows, size = logits_QV.shape
    block = 4096
    blocks = triton.cdiv(size, block)
    device = logits_QV.device
    options = _options(Tile(warps=8))
    values = torch.empty(rows, blocks * count, dtype=torch.float32, device=device)
    index = torch.empty(rows, blocks * count, dtype=torch.int32, device=device)
    _top_kernel[(rows, blocks)](
        logits_QV, values, index, size, logits_QV.stride(0), index, COUNT=count, BLOCK=block, NESTED=False, **options
    )
    if blocks > 1:
        best = torch.empty(rows, count, dtype=torch.float32, device=device)
        final = torch.empty(rows, count, dtype=torch.int32, device=device)
        _top_kernel[(rows, 1)](
            values, best, final, blocks * count, blocks * count, index,
            COUNT=count, BLOCK=triton.next_power_of_2(blocks * count), NESTED=True, **options,
        )  # fmt: skip
        index = final
    return index.long()
