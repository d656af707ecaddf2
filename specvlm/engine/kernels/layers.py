"""Compute linear layers for few rows. Shape suffixes: see the package docstring."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.kernels.launch import GROUP, Narrow, Tile, options_of, processors_of, split, to_8_bits, width_of
from specvlm.engine.ops import Weight

AHEAD = 1  # number of weight tiles that a program prefetches into L2 while the previous kernel still runs
LEAST = 32  # minimum number of inputs of a tile
PROGRAMS = {"full": 1.5, "fp8": 3, "int8": 3, "int4": 2}  # programs per multiprocessor that splitting k aims for
HALVES = 2  # minimum parts of the sum of quantised gate and up: whole, there are a few more tiles than run at a time
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _prefetch(w_ptr, offs_n, k0, stride, BYTES: tl.constexpr, BK: tl.constexpr):
    """Prefetch a weight tile into L2 while the previous kernel still runs. Safe, since no kernel writes weights."""
    LINES: tl.constexpr = (BK * BYTES + 127) // 128
    lines = tl.arange(0, LINES) * (128 // BYTES)
    addresses = (w_ptr + offs_n[:, None].to(tl.int64) * stride + k0 + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _nibbles(packed, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Unpack 4-bit weights q, stored as q + 8, to int8 values of 16 q.

    Flipping the top bit of q + 8 gives q in two's complement. Left in the high nibble, it is 16 q.
    """
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
    """Compute acc + w x for one tile of k, in float32. s: (BQ,) scales of 8-bit rows."""
    if KIND == "full":
        acc = tl.dot(w, x, acc)
    elif KIND == "fp8":
        acc += tl.dot(w, x) * s[None, :]
    else:
        acc += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * s[None, :]
    return acc


@triton.jit
def _add_nibbles(acc, packed, x_low, x_high, s_low, s_high, scale_at, further, ASM: tl.constexpr):
    """Compute acc + w x for one tile of int4: low nibbles with the first half of a row, high ones with the second.

    scale_at: Addresses of the (BN,) scales of the low nibbles. further: Distance to those of the high ones.
    """
    w_low = tl.load(scale_at) * 0.0625
    w_high = tl.load(scale_at + further) * 0.0625
    low = tl.dot(_nibbles(packed, False, ASM), x_low, out_dtype=tl.int32)
    high = tl.dot(_nibbles(packed, True, ASM), x_high, out_dtype=tl.int32)
    acc += low.to(tl.float32) * (w_low[:, None] * s_low[None, :])
    acc += high.to(tl.float32) * (w_high[:, None] * s_high[None, :])
    return acc


@triton.jit
def _dot_rows(
    x_ptr, xs_ptr, w_ptr, ws_ptr, offs_n, offs_q, Q, N, K, k_lo, k_hi,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply w (N, K) with x (Q, K) over stored columns k_lo..k_hi, whole tiles only: (BN, BQ) float32.

    A stored column of int4 holds two inputs. Weights are the left operand, so that they fill the tensor cores. 8-bit
    rows have a scale for every BK values. For them, padding rows and outputs repeat the last one instead of being
    masked: a mask costs a pass through registers. Values of padding may be anything; callers do not store them.
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
            acc = _add_nibbles(acc, packed, x_low, x_high, s_low, s_high, scale_at, half // GROUP, PDL)
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
    """Multiply x with up to three weights; y (S, Q, N0+N1+N2) has S partial sums over k. Grid (tiles, S).

    CHUNK: stored columns of a part. WIDTH: stored columns of all parts.
    """
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
    x_ptr, gate, up, y_ptr, Q, N, K,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BYTES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute y (Q, N) = silu(x gate^T) * (x up^T) for unquantised weights. One loop over both, to read x once."""
    tile = tl.program_id(0)
    offs_n = tile * BN + tl.arange(0, BN)
    offs_q = tl.arange(0, BQ)
    offs_k = tl.arange(0, BK)
    if PDL:
        gdc_launch_dependents()
        if tile * BN + BN <= N:
            _prefetch(gate, offs_n, 0, K, BYTES, AHEAD * BK)
            _prefetch(up, offs_n, 0, K, BYTES, AHEAD * BK)
        gdc_wait()
    g = tl.zeros((BN, BQ), dtype=tl.float32)
    u = tl.zeros((BN, BQ), dtype=tl.float32)
    for k in range(0, K, BK):
        w_at = offs_n[:, None].to(tl.int64) * K + (k + offs_k)[None, :]
        x = tl.load(x_ptr + offs_q[None, :] * K + (k + offs_k)[:, None], mask=(offs_q < Q)[None, :])
        w_g = tl.load(gate + w_at, mask=(offs_n < N)[:, None], eviction_policy="evict_first")
        w_u = tl.load(up + w_at, mask=(offs_n < N)[:, None], eviction_policy="evict_first")
        g = tl.dot(w_g, x, g)
        u = tl.dot(w_u, x, u)
    kind = y_ptr.dtype.element_ty
    at = y_ptr + offs_q[None, :].to(tl.int64) * N + offs_n[:, None]
    tl.store(at, _times_silu(g.to(kind), u.to(kind), kind).to(kind), mask=(offs_n < N)[:, None] & (offs_q < Q)[None, :])


@triton.jit
def _times_silu(g, u, kind: tl.constexpr):
    """Compute silu(g) * u in float32, rounded to `kind` where the Hugging Face layer rounds."""
    wide = g.to(tl.float32)
    return ((wide * tl.sigmoid(wide)).to(kind).to(tl.float32) * u.to(tl.float32)).to(kind).to(tl.float32)


@triton.jit
def _activation_kernel(gu_ptr, y_ptr, ys_ptr, N, parts, KIND: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr):
    """Compute y (Q, N) = silu(gate) * up in 8 bits from partial sums (S, Q, 2 N) of gate and up. Grid (Q, N / GROUP).

    parts: S. KIND: dtype to which Hugging Face's layers round.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = group * GROUP + tl.arange(0, GROUP)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    g = tl.zeros((GROUP,), tl.float32)
    u = tl.zeros((GROUP,), tl.float32)
    for part in range(parts):
        from_row = gu_ptr + (part * tl.num_programs(0) + row) * 2 * N
        g += tl.load(from_row + at)
        u += tl.load(from_row + N + at)
    narrow, scale = to_8_bits(_times_silu(g.to(KIND), u.to(KIND), KIND)[:, None], y_ptr)
    tl.store(y_ptr + row * N + at[:, None], narrow)
    tl.store(ys_ptr + row * (N // GROUP) + group + tl.arange(0, 1), scale)


def why_not(weights: Iterable[Weight], head_dim: int) -> str | None:
    """Say why these kernels cannot run a model with these weights and head width; None if they can."""
    if head_dim < 16 or head_dim % 16:
        return f"its heads are {head_dim} wide, which is not a multiple of 16"
    for weight in weights:
        if weight.inputs % LEAST or weight.data.stride(1) != 1:
            return f"{weight.inputs} inputs of a layer are not a multiple of {LEAST}"
        # Outputs need no check: they are inputs of the next layer, except the LM head's, which may be any number.
        if weight.kind != "full" and (weight.inputs % GROUP or head_dim != GROUP or weight.group not in (GROUP, weight.inputs)):
            return f"weights in {weight.kind} need layers of multiples of {GROUP} inputs and heads of {GROUP}"
        if weight.kind == "fp8" and (capability := torch.cuda.get_device_capability(weight.data.device)) < (8, 9):
            return f"weights in fp8 need compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
        if weight.kind == "int4" and weight.inputs % (2 * GROUP):
            return f"weights in int4 need inputs of multiples of {2 * GROUP}"
    return None


def tile_of(weight: Weight, rows: int, double: bool = False) -> Tile:
    """Choose a tiling, tuned on an H200 to keep enough bytes in flight. double: for gate and up in one kernel."""
    if weight.kind == "full" and weight.inputs % GROUP:
        return Tile(64, min(GROUP, weight.inputs & -weight.inputs), 4, 4)  # small models
    if weight.kind == "full" and rows > 64:
        return Tile(64, 128, 3, 4)  # a stage of gate and up takes 64 KiB
    if weight.kind == "full":
        return Tile(128, 128, 3, 8) if double and rows <= 32 and weight.outputs > 20000 else Tile(64, 128, 4, 4)
    return Tile(128, GROUP, 3 if weight.kind == "int4" else 4, 8)


def parts_of(weights: tuple[Weight, ...], tile: Tile, device: torch.device, least: int = 1) -> int:
    """Choose the number of parts of a sum over k, at least `least`, so that layers with few output tiles fill the device.

    The choice must not depend on the number of rows, so that passes of one row and of a tree round sums the same way.
    """
    tiles = sum(triton.cdiv(w.outputs, tile.outputs) for w in weights)
    stored = weights[0].data.shape[1]
    most = triton.cdiv(stored, tile.inputs)  # more parts would be empty
    programs = PROGRAMS[weights[0].kind] * processors_of(device)
    return min(most, max(least, round(programs / tiles), triton.cdiv(stored, 3584)))


def bytes_of(tile: Tile, weight: Weight, rows: int, weights: int = 1) -> tuple[int, int]:
    """Estimate the shared memory of a stage (tiles of weights and rows), and the other shared memory, in bytes."""
    size, halves = 2 if weight.kind == "full" else 1, 2 if weight.kind == "int4" else 1  # int4 reads two tiles of rows
    return tile.inputs * size * (weights * tile.outputs + halves * width_of(rows)), 2048


def linear(x_QK: Tensor | Narrow, weights: tuple[Weight, ...], whole: torch.dtype | None = None, least: int = 1) -> Tensor:
    """Multiply x by one to three weights, and concatenate the results: (S, Q, N) float32, with S partial sums over k.

    Args:
        x_QK: Rows.
        weights: Weights.
        whole: Dtype in which to return the full sum instead, (1, Q, N).
        least: Minimum of S, where that is possible.
    """
    x, scale = split(x_QK)
    rows, inputs = x.shape
    first, last = weights[0], weights[-1]
    tile = tile_of(first, rows)
    parts = 1 if whole else parts_of(weights, tile, x.device, least)
    sizes = [w.outputs for w in weights] + [0] * (3 - len(weights))
    three = (*weights, last, last)[:3]
    stored = first.data.shape[1]
    chunk = triton.cdiv(triton.cdiv(stored, parts), tile.inputs) * tile.inputs
    y = torch.empty(parts, rows, sum(sizes), dtype=whole or torch.float32, device=x.device)
    tiles = sum(triton.cdiv(n, tile.outputs) for n in sizes)
    _rows_kernel[(tiles, parts)](
        x, scale, *(w.data for w in three), *(w.scale for w in three), y, rows, *sizes, inputs, chunk,
        BQ=width_of(rows), BN=tile.outputs, BK=tile.inputs, KIND=first.kind, GROUP=first.group,
        BYTES=first.data.element_size(), WIDTH=stored, AHEAD=AHEAD, **options_of(tile, *bytes_of(tile, first, rows)),
    )  # fmt: skip
    return y


def gated(x_QK: Tensor | Narrow, gate: Weight, up: Weight, dtype: torch.dtype, kind: str = "full") -> Tensor | Narrow:
    """Compute (Q, N) silu(x gate^T) * (x up^T), rounding each step to dtype.

    For quantised weights, gate and up run as one linear layer, which is faster than both in one loop: 23 instead of
    32 us for those of the 7B in int4 on an H200.
    """
    if isinstance(x_QK, Narrow):
        both_SQN = linear(x_QK, (gate, up), least=HALVES)
        parts, rows, _ = both_SQN.shape
        if kind == "full":
            g, u = both_SQN.sum(0).to(dtype).chunk(2, 1)
            return silu(g) * u
        narrow = Narrow.empty(rows, gate.outputs, kind, both_SQN.device)
        _activation_kernel[(rows, gate.outputs // GROUP)](
            both_SQN, *split(narrow), gate.outputs, parts, KIND=TYPES[dtype], GROUP=GROUP, **options_of(Tile(warps=1))
        )
        return narrow
    (rows, inputs), tile = x_QK.shape, tile_of(gate, len(x_QK), double=True)
    y = torch.empty(rows, gate.outputs, dtype=dtype, device=x_QK.device)
    _gated_kernel[(triton.cdiv(gate.outputs, tile.outputs),)](
        x_QK, gate.data, up.data, y, rows, gate.outputs, inputs,
        BQ=width_of(rows), BN=tile.outputs, BK=tile.inputs, BYTES=gate.data.element_size(), AHEAD=AHEAD,
        **options_of(tile, *bytes_of(tile, gate, rows, weights=2)),
    )  # fmt: skip
    return y
