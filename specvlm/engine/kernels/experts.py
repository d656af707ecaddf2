"""Mixtures of experts for few rows. Shape suffixes: see the package docstring; E experts, X experts of a row, F width
between gate and down.

A pair is a row and one of its experts. Each expert that a row of the pass has chosen is read once for all its rows,
which are multiplied 16 at a time. Neither the other rows nor their experts change a bit of a row's result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.kernels.launch import Tile, options_of
from specvlm.engine.kernels.layers import linear
from specvlm.engine.ops import Experts, Weight

ROWS = 16  # rows of an expert that are multiplied together
TILE = Tile(64, 128, 3, 4)


@triton.jit
def _route_kernel(
    part_ptr, id_ptr, weight_ptr, like_ptr, Q, E,
    S: tl.constexpr, X: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Choose the X likeliest experts of a row, and their weights, which sum to 1. Grid (Q,).

    Of equal experts the first is chosen, and the last if scores are NaN. WIDE: X padded. BLOCK: E padded.
    """
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    x = tl.arange(0, WIDE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kind = like_ptr.dtype.element_ty
    logit = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(S):
        logit += tl.load(part_ptr + (s * Q + row) * E + e, mask=e < E, other=0.0)
    logit = tl.where(e < E, logit.to(kind).to(tl.float32), float("-inf"))
    chance = tl.exp(logit - tl.max(logit, 0))
    chance = chance / tl.sum(chance, 0)
    ids = tl.zeros((WIDE,), dtype=tl.int32)
    weights = tl.zeros((WIDE,), dtype=tl.float32)
    for i in tl.static_range(X):
        most = tl.max(logit, 0)
        best = tl.minimum(tl.min(tl.where(logit == most, e, BLOCK), 0), E - 1)  # NaN equals nothing
        ids = tl.where(x == i, best, ids)
        weights = tl.where(x == i, tl.sum(tl.where(e == best, chance, 0.0), 0), weights)
        logit = tl.where(e == best, float("-inf"), logit)
    weights = (weights / tl.sum(weights, 0)).to(kind).to(tl.float32)
    tl.store(id_ptr + row * X + x, ids, mask=x < X)
    tl.store(weight_ptr + row * X + x, weights, mask=x < X)


@triton.jit
def _pairs_of(id_ptr, PAIRS, p, BY_PAIR: tl.constexpr):
    """Return this program's expert, and its pairs: mask, ranks, count. No pairs if another program has the expert."""
    ids = tl.load(id_ptr + p, mask=p < PAIRS, other=-1)
    expert = tl.program_id(1)
    first = 0
    if BY_PAIR:
        first = expert
        expert = tl.load(id_ptr + first)
    mine = ids == expert
    taken = tl.sum((mine & (p < first)).to(tl.int32), 0) > 0
    mine = mine & (not taken)
    return expert, mine, tl.cumsum(mine.to(tl.int32), 0) - 1, tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _some_pairs(mine, rank, count, p, first, ROWS: tl.constexpr):
    """Return the indices of ROWS pairs, from pair number `first` of `mine` on, and a mask of those that exist."""
    wanted = first + tl.arange(0, ROWS)
    hit = mine[None, :] & (rank[None, :] == wanted[:, None])
    return tl.sum(tl.where(hit, p[None, :], 0), 1), wanted < count


@triton.jit
def _load_tile(w_ptr, s_ptr, outputs, k, offs_k, ok, K, kind, KIND: tl.constexpr, GROUP: tl.constexpr, HIGH: tl.constexpr):
    """Load a tile of weights in the dtype `kind`, dequantised as `QuantizedLinear.weight_in` does.

    outputs: rows of the stacked weights. k: first stored column. In int4, stored column c holds inputs c and c + K / 2;
    HIGH: load the latter.
    """
    WIDE: tl.constexpr = 2 if KIND == "int4" else 1
    at = outputs[:, None].to(tl.int64) * (K // WIDE) + (k + offs_k)[None, :]
    w = tl.load(w_ptr + at, mask=ok, other=0.0 if KIND != "int4" else 0)
    if KIND == "full":
        return w
    if KIND == "int4":
        q = (w >> 4).to(tl.float32) - 8 if HIGH else (w & 15).to(tl.float32) - 8
        group = (k + (K // 2 if HIGH else 0)) // GROUP  # of the whole tile
        return (q * tl.load(s_ptr + outputs.to(tl.int64) * (K // GROUP) + group)[:, None]).to(kind)
    return (w.to(tl.float32) * tl.load(s_ptr + outputs)[:, None]).to(kind)


@triton.jit
def _gated_experts_kernel(
    x_ptr, id_ptr, w_ptr, s_ptr, y_ptr, PAIRS, F, K,
    X: tl.constexpr, BLOCK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BY_PAIR: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute y (pairs, F) = silu(x gate^T) * (x up^T) of each pair's expert. Grid (tiles of F, experts).

    w: (E * 2 F, K), gate before up. Rounded where the Hugging Face layer rounds.
    """
    p = tl.arange(0, BLOCK)
    offs_n = tl.program_id(0) * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, mine, rank, count = _pairs_of(id_ptr, PAIRS, p, BY_PAIR)
    kind = y_ptr.dtype.element_ty
    STORED = K // 2 if KIND == "int4" else K
    gate = expert * 2 * F + tl.minimum(offs_n, F - 1)
    for first in range(0, count, BQ):
        pair, there = _some_pairs(mine, rank, count, p, first, BQ)
        row = pair // X
        g = tl.zeros((BN, BQ), dtype=tl.float32)
        u = tl.zeros((BN, BQ), dtype=tl.float32)
        for k in range(0, STORED, BK):
            inputs = k + offs_k
            ok = inputs < STORED
            mask = (offs_n < F)[:, None] & ok[None, :]
            x_at = x_ptr + row[None, :] * K + inputs[:, None]
            here = there[None, :] & ok[:, None]
            x = tl.load(x_at, mask=here, other=0.0)
            g = tl.dot(_load_tile(w_ptr, s_ptr, gate, k, offs_k, mask, K, kind, KIND, GROUP, False), x, g)
            u = tl.dot(_load_tile(w_ptr, s_ptr, gate + F, k, offs_k, mask, K, kind, KIND, GROUP, False), x, u)
            if KIND == "int4":
                x = tl.load(x_at + STORED, mask=here, other=0.0)
                g = tl.dot(_load_tile(w_ptr, s_ptr, gate, k, offs_k, mask, K, kind, KIND, GROUP, True), x, g)
                u = tl.dot(_load_tile(w_ptr, s_ptr, gate + F, k, offs_k, mask, K, kind, KIND, GROUP, True), x, u)
        g = g.to(kind).to(tl.float32)
        u = u.to(kind).to(tl.float32)
        out = (g * tl.sigmoid(g)).to(kind).to(tl.float32) * u
        tl.store(y_ptr + pair[None, :] * F + offs_n[:, None], out.to(kind), mask=(offs_n < F)[:, None] & there[None, :])


@triton.jit
def _down_experts_kernel(
    y_ptr, id_ptr, weight_ptr, w_ptr, s_ptr, out_ptr, PAIRS, Q, N, F,
    X: tl.constexpr, BLOCK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BY_PAIR: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute out (X, Q, N): each pair's y times its expert's w (E * N, F) and weight. Grid (tiles of N, experts)."""
    p = tl.arange(0, BLOCK)
    offs_n = tl.program_id(0) * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, mine, rank, count = _pairs_of(id_ptr, PAIRS, p, BY_PAIR)
    kind = y_ptr.dtype.element_ty
    STORED = F // 2 if KIND == "int4" else F
    down = expert * N + tl.minimum(offs_n, N - 1)
    for first in range(0, count, BQ):
        pair, there = _some_pairs(mine, rank, count, p, first, BQ)
        acc = tl.zeros((BN, BQ), dtype=tl.float32)
        for k in range(0, STORED, BK):
            inputs = k + offs_k
            ok = inputs < STORED
            mask = (offs_n < N)[:, None] & ok[None, :]
            y_at = y_ptr + pair[None, :] * F + inputs[:, None]
            here = there[None, :] & ok[:, None]
            y = tl.load(y_at, mask=here, other=0.0)
            acc = tl.dot(_load_tile(w_ptr, s_ptr, down, k, offs_k, mask, F, kind, KIND, GROUP, False), y, acc)
            if KIND == "int4":
                y = tl.load(y_at + STORED, mask=here, other=0.0)
                acc = tl.dot(_load_tile(w_ptr, s_ptr, down, k, offs_k, mask, F, kind, KIND, GROUP, True), y, acc)
        acc *= tl.load(weight_ptr + pair, mask=there, other=0.0)[None, :]
        to = out_ptr + ((pair % X) * Q + pair // X)[None, :].to(tl.int64) * N + offs_n[:, None]
        tl.store(to, acc, mask=(offs_n < N)[:, None] & there[None, :])


def _inputs_of(stack: Weight) -> int:
    """Return the number of inputs of a tile. In int4, all inputs of a tile must share a scale."""
    return min(TILE.inputs, stack.group) if stack.kind == "int4" else TILE.inputs


def experts(x_QK: Tensor, layer: Experts) -> Tensor:
    """Send each row through its experts. Returns (X, Q, N) float32 parts, whose sum is the layer's output."""
    rows, width = x_QK.shape
    gate_up, down, count, chosen = layer.gate_up, layer.down, layer.count, layer.chosen
    inner, pairs = down.inputs, rows * chosen
    scores = linear(x_QK, (layer.router,))
    ids = torch.empty(rows, chosen, dtype=torch.int32, device=x_QK.device)
    weights = torch.empty(rows, chosen, dtype=torch.float32, device=x_QK.device)
    _route_kernel[(rows,)](
        scores, ids, weights, x_QK, rows, count, S=len(scores), X=chosen, WIDE=triton.next_power_of_2(chosen),
        BLOCK=triton.next_power_of_2(count), **options_of(Tile(warps=1)),
    )  # fmt: skip
    y = torch.empty(pairs, inner, dtype=x_QK.dtype, device=x_QK.device)
    out = torch.empty(chosen, rows, width, dtype=torch.float32, device=x_QK.device)
    named = dict(X=chosen, BLOCK=triton.next_power_of_2(pairs), BQ=ROWS, BN=TILE.outputs, BY_PAIR=pairs < count)
    stage = x_QK.element_size() * TILE.inputs  # bytes of an output's, or a row's, inputs of a tile
    _gated_experts_kernel[(triton.cdiv(inner, TILE.outputs), min(pairs, count))](
        x_QK, ids, gate_up.data, gate_up.scale, y, pairs, inner, width, BK=_inputs_of(gate_up),
        KIND=gate_up.kind, GROUP=gate_up.group,
        **named, **options_of(TILE, stage * 2 * (TILE.outputs + ROWS), 2048),
    )  # fmt: skip
    _down_experts_kernel[(triton.cdiv(width, TILE.outputs), min(pairs, count))](
        y, ids, weights, down.data, down.scale, out, pairs, rows, width, inner, BK=_inputs_of(down),
        KIND=down.kind, GROUP=down.group,
        **named, **options_of(TILE, stage * (TILE.outputs + ROWS), 2048),
    )  # fmt: skip
    return out
