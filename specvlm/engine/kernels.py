"""Triton kernels for passes of few rows, where a step costs the bytes of the weights and the keys it reads.

Every kernel may be captured in a CUDA graph: what changes from pass to pass (the length of the prefix) is read from
the device. With `PDL` a kernel may be scheduled before its predecessor has ended (programmatic dependent launch): each
lets its successor come at once, and waits for its predecessor before it touches anything but weights. Since every
kernel waits, the one after next waits for both, and the order of memory is that of the stream.

Shape suffixes: Q rows, K inputs, N outputs, S parts of a split sum, H query heads, J KV heads, G = H / J, D head width,
C slots of a cache, T rows of the tree, V vocabulary.

The plain forms of the same functions, which the tests compare with, are in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.ops import Weight

PDL = True  # off in Triton's interpreter, which knows no such launch


# ---- rows in 8 bits -----------------------------------------------------------------------------------------------------


@triton.jit
def _narrow(y, y_ptr):
    """Values (GROUP, n) in the 8 bits of y_ptr's type, and a scale for each column."""
    kind = y_ptr.dtype.element_ty
    largest: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
    scale = tl.maximum(tl.max(tl.abs(y), 0) / largest, 1e-20)
    narrow = y / scale[None, :]
    if kind == tl.int8:
        narrow = tl.floor(narrow + 0.5)
    return narrow.to(kind), scale


# ---- linear layers of few rows ----------------------------------------------------------------------------------------


@triton.jit
def _prefetch(w_ptr, offs_n, k0, stride, BYTES: tl.constexpr, BK: tl.constexpr):
    """Ask the L2 cache for a weight tile, which no earlier kernel writes, while that kernel is still running."""
    LINES: tl.constexpr = (BK * BYTES + 127) // 128
    lines = tl.arange(0, LINES) * (128 // BYTES)
    addresses = (w_ptr + offs_n[:, None].to(tl.int64) * stride + k0 + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _nibbles(packed, HIGH: tl.constexpr, ASM: tl.constexpr):
    """int8 of 16 times the weight: a nibble q + 8 is q in two's complement but for its top bit, and stays at the top."""
    if ASM:
        if HIGH:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; xor.b32 t, $1, 0x88888888; and.b32 $0, t, 0xF0F0F0F0; }",
                "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; xor.b32 t, $1, 0x88888888; shl.b32 t, t, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    q = packed >> 4 if HIGH else packed & 15
    return (q.to(tl.int8) - 8) * 16


@triton.jit
def _add_product(acc, w, x, s, KIND: tl.constexpr):
    """acc + w x for one tile of k, in float32; s: (BQ,) scales of rows in 8 bits."""
    if KIND == "full":
        acc = tl.dot(w, x, acc)
    elif KIND == "fp8":
        acc += tl.dot(w, x) * s[None, :]
    else:
        acc += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * s[None, :]
    return acc


@triton.jit
def _dot_rows(
    x_ptr, xs_ptr, w_ptr, ws_ptr, offs_n, offs_q, Q, N, K, k_lo, k_hi,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(BN, BQ) float32 of w (N, K) times x (Q, K) over k_lo..k_hi; weights stand first, so that they fill the tensor cores.

    Whole tiles of k only. Rows in 8 bits have a scale each BK values; there spare rows and outputs repeat the last one, since
    a mask costs a pass through registers. What nobody stores may be undefined.
    """
    offs_k = tl.arange(0, BK)
    rows = tl.minimum(offs_q, Q - 1)
    if KIND != "full":
        offs_n = tl.minimum(offs_n, N - 1)
    groups = K // BK
    acc = tl.zeros((BN, BQ), dtype=tl.float32)
    s = tl.zeros((BQ,), dtype=tl.float32)
    if KIND == "int4":
        half = K // 2
        for k in range(k_lo, k_hi, BK):
            w_at = offs_n[:, None].to(tl.int64) * half + (k + offs_k)[None, :]
            packed = tl.load(w_ptr + w_at, eviction_policy="evict_first")
            x_at = x_ptr + rows[None, :] * K + (k + offs_k)[:, None]
            x_low = tl.load(x_at)
            x_high = tl.load(x_at + half)
            s_at = xs_ptr + rows * groups + k // BK
            s_low = tl.load(s_at)
            s_high = tl.load(s_at + groups // 2)
            scale_at = ws_ptr + offs_n * (K // GROUP) + k // GROUP
            w_low = tl.load(scale_at) * 0.0625
            w_high = tl.load(scale_at + half // GROUP) * 0.0625
            acc += tl.dot(_nibbles(packed, False, PDL), x_low, out_dtype=tl.int32).to(tl.float32) * (
                w_low[:, None] * s_low[None, :]
            )
            acc += tl.dot(_nibbles(packed, True, PDL), x_high, out_dtype=tl.int32).to(tl.float32) * (
                w_high[:, None] * s_high[None, :]
            )
    else:
        for k in range(k_lo, k_hi, BK):
            w_at = offs_n[:, None].to(tl.int64) * K + (k + offs_k)[None, :]
            if KIND == "full":
                w = tl.load(w_ptr + w_at, mask=(offs_n < N)[:, None], eviction_policy="evict_first")
                x = tl.load(x_ptr + offs_q[None, :] * K + (k + offs_k)[:, None], mask=(offs_q < Q)[None, :])
            else:
                w = tl.load(w_ptr + w_at, eviction_policy="evict_first")
                x = tl.load(x_ptr + rows[None, :] * K + (k + offs_k)[:, None])
                s = tl.load(xs_ptr + rows * groups + k // BK)
            acc = _add_product(acc, w, x, s, KIND)
        if KIND != "full":
            acc *= tl.load(ws_ptr + offs_n)[:, None]
    return acc


@triton.jit
def _rows_kernel(
    x_ptr, xs_ptr, w0, w1, w2, s0, s1, s2, y_ptr, Q, N0, N1, N2, K, CHUNK,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
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
        gdc_launch_dependents()
        if first * BN + BN <= N and k_lo + AHEAD * BK <= k_hi:
            _prefetch(w, offs_n, k_lo, WIDTH, BYTES, AHEAD * BK)
        gdc_wait()
    acc = _dot_rows(x_ptr, xs_ptr, w, s, offs_n, offs_q, Q, N, K, k_lo, k_hi, BQ, BN, BK, KIND, GROUP, PDL)
    at = y_ptr + (part * Q + offs_q)[None, :].to(tl.int64) * (N0 + N1 + N2) + (shift + offs_n)[:, None]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_q < Q)[None, :])


@triton.jit
def _gated_kernel(
    x_ptr, xs_ptr, gate, up, gate_s, up_s, y_ptr, ys_ptr, like_ptr, Q, N, K,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (Q, N) = silu(x gate^T) * (x up^T), each rounded as the Hugging Face layer rounds it. Grid (tiles,).

    NARROW: y in 8 bits, with a scale a tile and row.
    """
    tile = tl.program_id(0)
    offs_n = tile * BN + tl.arange(0, BN)
    offs_q = tl.arange(0, BQ)
    offs_k = tl.arange(0, BK)
    if PDL:
        gdc_launch_dependents()
        if tile * BN + BN <= N:
            _prefetch(gate, offs_n, 0, WIDTH, BYTES, AHEAD * BK)
            _prefetch(up, offs_n, 0, WIDTH, BYTES, AHEAD * BK)
        gdc_wait()
    kind = like_ptr.dtype.element_ty
    if KIND == "int4":
        g = _dot_rows(x_ptr, xs_ptr, gate, gate_s, offs_n, offs_q, Q, N, K, 0, WIDTH, BQ, BN, BK, KIND, GROUP, PDL)
        u = _dot_rows(x_ptr, xs_ptr, up, up_s, offs_n, offs_q, Q, N, K, 0, WIDTH, BQ, BN, BK, KIND, GROUP, PDL)
    else:  # one loop over both, so that x is read once
        rows = tl.minimum(offs_q, Q - 1)
        groups = K // BK
        g = tl.zeros((BN, BQ), dtype=tl.float32)
        u = tl.zeros((BN, BQ), dtype=tl.float32)
        s = tl.zeros((BQ,), dtype=tl.float32)
        for k in range(0, WIDTH, BK):
            w_at = offs_n[:, None].to(tl.int64) * K + (k + offs_k)[None, :]
            if KIND == "full":
                x = tl.load(x_ptr + offs_q[None, :] * K + (k + offs_k)[:, None], mask=(offs_q < Q)[None, :])
                w_g = tl.load(gate + w_at, mask=(offs_n < N)[:, None], eviction_policy="evict_first")
                w_u = tl.load(up + w_at, mask=(offs_n < N)[:, None], eviction_policy="evict_first")
            else:
                x = tl.load(x_ptr + rows[None, :] * K + (k + offs_k)[:, None])
                w_g = tl.load(gate + w_at, eviction_policy="evict_first")
                w_u = tl.load(up + w_at, eviction_policy="evict_first")
                s = tl.load(xs_ptr + rows * groups + k // BK)
            g = _add_product(g, w_g, x, s, KIND)
            u = _add_product(u, w_u, x, s, KIND)
        if KIND != "full":
            g *= tl.load(gate_s + offs_n)[:, None]
            u *= tl.load(up_s + offs_n)[:, None]
    g = g.to(kind).to(tl.float32)
    u = u.to(kind).to(tl.float32)
    out = ((g * tl.sigmoid(g)).to(kind).to(tl.float32) * u).to(kind).to(tl.float32)
    at = y_ptr + offs_q[None, :].to(tl.int64) * N + offs_n[:, None]
    ok = (offs_n < N)[:, None] & (offs_q < Q)[None, :]
    if NARROW:
        narrow, scale = _narrow(out, y_ptr)
        tl.store(at, narrow, mask=ok)
        tl.store(ys_ptr + offs_q * (N // BN) + tile, scale, mask=offs_q < Q)
    else:
        tl.store(at, out.to(kind), mask=ok)


# ---- what stands between the linear layers ----------------------------------------------------------------------------


@triton.jit
def _add_norm_kernel(
    x_ptr, part_ptr, weight_ptr, sum_ptr, y_ptr, ys_ptr, Q, K, eps,
    S: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """sum = x + (the S parts of a linear layer's output); y = RMSNorm(sum) * weight. Grid (Q,).

    NARROW: y in 8 bits, with a scale for each GROUP of a row.
    """
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
    tl.store(sum_ptr + row * K + offs, x.to(kind), mask=ok)
    scaled = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    y = (scaled.to(kind).to(tl.float32) * weight.to(tl.float32)).to(kind)
    if NARROW:
        groups = tl.trans(tl.reshape(y.to(tl.float32), (BLOCK // GROUP, GROUP)))
        narrow, scale = _narrow(groups, y_ptr)
        tl.store(y_ptr + row * K + offs, tl.reshape(tl.trans(narrow), (BLOCK,)), mask=ok)
        at = tl.arange(0, BLOCK // GROUP)
        tl.store(ys_ptr + row * (K // GROUP) + at, scale, mask=at < K // GROUP)
    else:
        tl.store(y_ptr + row * K + offs, y, mask=ok)


@triton.jit
def _whole_kernel(part_ptr, y_ptr, size, S: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The sum of S parts of `size` values each, rounded. Grid (blocks,)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = offs < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(S):
        y += tl.load(part_ptr + s * size + offs, mask=ok, other=0.0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=ok)


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
        gdc_launch_dependents()
        gdc_wait()
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
def _attend_tile(q, k, v, seen, m, total, acc, scale, MASKED: tl.constexpr, IEEE: tl.constexpr):
    """One tile of keys into the running maximum m, total and weighted values acc of an online softmax, base 2."""
    if IEEE:  # noqa: SIM108
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        score = tl.dot(q, tl.trans(k))
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    top = tl.maximum(m, tl.max(score, 1) * scale)
    safe = top
    if MASKED:
        safe = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet
    weight = tl.exp2(score * scale - safe[:, None])
    shrink = tl.exp2(m - safe)
    total = total * shrink + tl.sum(weight, 1)
    if IEEE:
        acc = tl.dot(weight, v, acc * shrink[:, None], input_precision="ieee")
    else:
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
    return top, total, acc


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr, base_ptr, out_ptr, lse_ptr, Q, T, capacity, scale, share,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, IEEE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Softmax over one part of the keys for a block of rows of one KV head's queries. Grid (J, parts, blocks).

    A block is `share` rows, at most R. Parts are equal shares of the whole tiles of the first `base` slots; the last part
    also takes what is left of those, and the T slots of the tree.
    """
    head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    base = tl.load(base_ptr).to(tl.int32)
    k_ptr += head.to(tl.int64) * capacity * D
    v_ptr += head.to(tl.int64) * capacity * D
    G: tl.constexpr = H // J
    first = tl.program_id(2) * share
    d = tl.arange(0, D)
    offs_n = tl.arange(0, BN)
    r = first + tl.arange(0, R)
    ok = r < tl.minimum(first + share, Q * G)
    # Row r of a KV head is row r // G of the pass, query head head * G + r % G.
    q = tl.load(q_ptr + ((r // G) * H + head * G + r % G)[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
    m = tl.full((R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((R,), dtype=tl.float32)
    acc = tl.zeros((R, D), dtype=tl.float32)
    whole = base // BN * BN
    step = tl.cdiv(whole // BN, parts) * BN
    lo = tl.minimum(part * step, whole)
    hi = tl.minimum(lo + step, whole)
    for start in range(lo, hi, BN):
        at = (start + offs_n)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
        m, total, acc = _attend_tile(q, k, v, True, m, total, acc, scale, False, IEEE)
    if part == parts - 1:
        for start in range(whole, base + T, BN):
            slots = start + offs_n
            node = slots - base
            at = slots[:, None] * D + d[None, :]
            inside = node < T
            k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)
            v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
            marked = tl.load(
                seen_ptr + (r // G)[:, None] * T + node[None, :], mask=ok[:, None] & (inside & (node >= 0))[None, :], other=0
            )
            seen = (marked != 0) | (node < 0)[None, :]
            m, total, acc = _attend_tile(q, k, v, seen, m, total, acc, scale, True, IEEE)
    safe = tl.where(total > 0, total, 1.0)
    at = (part * J + head) * (Q * G) + r
    tl.store(out_ptr + at[:, None].to(tl.int64) * D + d[None, :], acc / safe[:, None], mask=ok[:, None])
    tl.store(lse_ptr + at, m + tl.log2(safe), mask=ok)  # -inf where nothing was seen


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, y_ptr, ys_ptr, Q, S,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The S parts of an attention into one, by their log-sum-exp (base 2). Grid (Q, H).

    NARROW: y in 8 bits, with a scale a head and row.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    G: tl.constexpr = H // J
    d = tl.arange(0, D)
    s = tl.arange(0, BS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    inside = s < S
    at = (s * J + head // G) * (Q * G) + row * G + head % G
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    part = tl.load(part_ptr + at[:, None].to(tl.int64) * D + d[None, :], mask=inside[:, None], other=0.0)
    y = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    at = y_ptr + (row * H + head) * D + d
    if NARROW:
        narrow, scale = _narrow(y[:, None], y_ptr)
        tl.store(at[:, None], narrow)
        tl.store(ys_ptr + row * H + head + tl.arange(0, 1), scale)
    else:
        tl.store(at, y.to(y_ptr.dtype.element_ty))


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
        gdc_launch_dependents()
        gdc_wait()
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


LOG2_E = 1.4426950408889634
AHEAD = 1  # tiles of weights a program asks the L2 cache for while the kernel before it is still running
LEAST = 32  # fewest inputs of a tile
GROUP = 128  # values of a row in 8 bits that share a scale: a tile of k, a head, a tile of the gated layer


@dataclass(frozen=True)
class Tile:
    """How a linear layer of few rows is cut: outputs and inputs of a tile, tiles in flight, warps of a program."""

    outputs: int = 64
    inputs: int = 128
    stages: int = 4
    warps: int = 4


@dataclass(frozen=True)
class Narrow:
    """Rows in 8 bits: data (Q, K) int8 or float8, scale (Q, K / GROUP). What weights in 8 or 4 bits are multiplied with."""

    data: Tensor
    scale: Tensor

    def __getitem__(self, rows: slice) -> Narrow:
        return Narrow(self.data[rows].contiguous(), self.scale[rows].contiguous())

    @classmethod
    def empty(cls, rows: int, width: int, kind: str, device: torch.device) -> Narrow:
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        data = torch.empty(rows, width, dtype=dtype, device=device)
        return cls(data, torch.empty(rows, width // GROUP, dtype=torch.float32, device=device))


def why_not(weights: Iterable[Weight], head_dim: int) -> str | None:
    """Why these kernels cannot do a model's linear layers; None when they can."""
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"its heads are {head_dim} wide, which is no power of two from 16 on"
    for weight in weights:
        if weight.inputs % LEAST or weight.data.stride(1) != 1:
            return f"{weight.inputs} inputs of a layer are no multiple of {LEAST}"
        # A head may have any number of outputs; those of the other layers are the inputs of the next.
        if weight.kind != "full" and (weight.inputs % GROUP or head_dim != GROUP or weight.group not in (GROUP, weight.inputs)):
            return f"weights in {weight.kind} need layers of multiples of {GROUP} inputs and heads of {GROUP}"
        if weight.kind == "int4" and weight.inputs % (2 * GROUP):
            return f"weights in int4 need inputs of multiples of {2 * GROUP}"
    return None


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "PDL": PDL, **({"launch_pdl": True} if PDL else {})}


def _width(rows: int) -> int:
    """Rows as the tensor cores take them."""
    return max(16, triton.next_power_of_2(rows))


def tile_of(weight: Weight, rows: int, double: bool = False) -> Tile:
    """By measurement on an H200: enough bytes in flight for its memory. double: two weights of this kind at once."""
    if weight.kind == "full" and weight.inputs % GROUP:
        return Tile(64, min(GROUP, weight.inputs & -weight.inputs), 4, 4)  # small models
    if weight.kind == "full":
        return Tile(128, 128, 3, 8) if double and rows <= 32 and weight.outputs > 20000 else Tile(64, 128, 4, 4)
    return Tile(128, GROUP, 3, 8) if double else Tile(64, GROUP, 6, 4)


def parts_of(weights: tuple[Weight, ...], tile: Tile, device: torch.device) -> int:
    """Parts of a sum over k, so that tiles of few outputs fill the device. The same whatever the number of rows: with it,
    a row's sums are rounded alike in a pass of one row and in a pass of a tree.
    """
    tiles = sum(triton.cdiv(w.outputs, tile.outputs) for w in weights)
    return max(1, round(1.5 * _processors(device) / tiles), triton.cdiv(weights[0].data.shape[1], 3584))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _split(x: Tensor | Narrow) -> tuple[Tensor, Tensor]:
    return (x.data, x.scale) if isinstance(x, Narrow) else (x, x)


def linear(x_QK: Tensor | Narrow, weights: tuple[Weight, ...], whole: torch.dtype | None = None) -> Tensor:
    """(S, Q, N) float32: x times one to three weights side by side, as S sums over shares of k.

    whole: (1, Q, N) of that dtype.
    """
    x, scale = _split(x_QK)
    rows, inputs = x.shape
    first, last = weights[0], weights[-1]
    tile = tile_of(first, rows)
    parts = 1 if whole else parts_of(weights, tile, x.device)
    sizes = [w.outputs for w in weights] + [0] * (3 - len(weights))
    three = (*weights, last, last)[:3]
    stored = first.data.shape[1]
    chunk = triton.cdiv(triton.cdiv(stored, parts), tile.inputs) * tile.inputs
    y = torch.empty(parts, rows, sum(sizes), dtype=whole or torch.float32, device=x.device)
    tiles = sum(triton.cdiv(n, tile.outputs) for n in sizes)
    _rows_kernel[(tiles, parts)](
        x, scale, *(w.data for w in three), *(w.scale for w in three), y, rows, *sizes, inputs, chunk,
        BQ=_width(rows), BN=tile.outputs, BK=tile.inputs, KIND=first.kind, GROUP=first.group,
        BYTES=first.data.element_size(), WIDTH=stored, AHEAD=AHEAD, **_options(tile),
    )  # fmt: skip
    return y


def gated(x_QK: Tensor | Narrow, gate: Weight, up: Weight, dtype: torch.dtype, kind: str = "full") -> Tensor | Narrow:
    """(Q, N): silu(x gate^T) * (x up^T), rounded as in dtype; kind: of the weights it will meet."""
    x, scale = _split(x_QK)
    rows, inputs = x.shape
    tile = tile_of(gate, rows, double=True)
    narrow = Narrow.empty(rows, gate.outputs, kind, x.device) if kind != "full" else None
    y = torch.empty(rows if narrow is None else 0, gate.outputs, dtype=dtype, device=x.device)
    out, out_scale = (y, y) if narrow is None else _split(narrow)
    _gated_kernel[(triton.cdiv(gate.outputs, tile.outputs),)](
        x, scale, gate.data, up.data, gate.scale, up.scale, out, out_scale, y, rows, gate.outputs, inputs,
        BQ=_width(rows), BN=tile.outputs, BK=tile.inputs, KIND=gate.kind, GROUP=gate.group,
        BYTES=gate.data.element_size(), WIDTH=gate.data.shape[1], AHEAD=AHEAD, NARROW=narrow is not None, **_options(tile),
    )  # fmt: skip
    return y if narrow is None else narrow


def add_norm(
    x_QK: Tensor, parts_SQK: Tensor | None, weight_K: Tensor, eps: float, kind: str = "full"
) -> tuple[Tensor, Tensor | Narrow]:
    """(x + sum of parts, its RMSNorm times weight), both (Q, K); kind: of the weights the second will meet."""
    rows, width = x_QK.shape
    total = torch.empty_like(x_QK)
    y = torch.empty_like(x_QK) if kind == "full" else Narrow.empty(rows, width, kind, x_QK.device)
    _add_norm_kernel[(rows,)](
        x_QK, x_QK if parts_SQK is None else parts_SQK, weight_K, total, *_split(y), rows, width, eps,
        S=0 if parts_SQK is None else len(parts_SQK), BLOCK=triton.next_power_of_2(width), GROUP=GROUP,
        NARROW=kind != "full", **_options(Tile(warps=16)),
    )  # fmt: skip
    return total, y


def whole(parts_SQN: Tensor, out_QN: Tensor) -> Tensor:
    """The sum of a linear layer's parts in `out`, rounded once."""
    count, block = len(parts_SQN), 2048
    _whole_kernel[(triton.cdiv(out_QN.numel(), block),)](
        parts_SQN, out_QN, out_QN.numel(), S=count, BLOCK=block, **_options(Tile(warps=8))
    )
    return out_QN


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


def row_blocks(rows: int) -> tuple[int, int]:
    """(R, blocks): the rows of a KV head as equal blocks of at most R.

    Blocks read the same keys side by side, so that all but one find them in the L2 cache. 128 rows in a program do a third more
    a second than 64 in each of two, so smaller ones are for where they save padding: at three of them.
    """
    blocks = triton.cdiv(rows, 64)
    return (min(64, _width(rows)), blocks) if blocks in (1, 3) else (128, triton.cdiv(rows, 128))


def attention(
    q_QHD: Tensor, keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, seen_QT: Tensor, scale: float, kind: str = "full"
) -> Tensor | Narrow:
    """(Q, H * D): each row over the first `base` slots and those of the next T that seen (int8) marks; kind: of the weights
    it will meet. Flash decoding (split keys, parts merged by their log-sum-exp) with a tree mask on the last part.
    """
    rows, heads, width = q_QHD.shape
    kv_heads, capacity, _ = keys_JCD.shape
    group_rows = rows * (heads // kv_heads)
    many, blocks = row_blocks(group_rows)
    # Programs that fill the device once: one on each processor; two where small blocks hold the tensor cores busy, and where
    # one alone would wait for memory (one row of the 32B over 131,072 keys: 57 us a layer more in 16 parts than in 32).
    beside, processors = many <= 64 and blocks > 1, _processors(q_QHD.device)
    two = beside or (many <= 64 and processors // kv_heads < 32)
    parts = max(1, processors * (2 if two else 1) // (kv_heads * blocks))
    device = q_QHD.device
    part = torch.empty(parts, kv_heads, group_rows, width, dtype=torch.float32, device=device)
    lse = torch.empty(parts, kv_heads, group_rows, dtype=torch.float32, device=device)
    _attention_kernel[(kv_heads, parts, blocks)](
        q_QHD, keys_JCD, values_JCD, seen_QT, base, part, lse,
        rows, seen_QT.shape[1], capacity, scale * LOG2_E, triton.cdiv(group_rows, blocks),
        H=heads, J=kv_heads, D=width, R=many, BN=32 if beside else 64, IEEE=q_QHD.dtype == torch.float32,
        **_options(Tile(warps=8 if many > 64 else 4, stages=4 if beside else 3)),
    )  # fmt: skip
    y = torch.empty(rows, heads * width, dtype=q_QHD.dtype, device=device) if kind == "full" else None
    out = Narrow.empty(rows, heads * width, kind, device) if y is None else y
    _merge_kernel[(rows, heads)](
        part, lse, *_split(out), rows, parts,
        H=heads, J=kv_heads, D=width, BS=triton.next_power_of_2(parts), NARROW=y is None,
        **_options(Tile(warps=max(1, triton.next_power_of_2(parts) // 32))),
    )  # fmt: skip
    return out


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
