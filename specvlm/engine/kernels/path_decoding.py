"""Path attention: bit-exact attention, whose result for a row depends only on the row's own path.

The n keys of a row, in the order of its path, are split into segments that depend on n alone: full chunks, then leaves
of LEAF slots, the last of which may be shorter. A chunk has CHUNK slots, doubled until a row has at most MOST chunks.
Segments that end below `base` are contiguous in the cache, and blocks of rows read them together. A row's other
segments are gathered along its path, with the same arithmetic in the same order. Segments are merged in order. So
neither the number of rows, nor the tree, nor the cache's capacity, nor other requests change a bit
(tests/test_exact_gpu.py).

Shape suffixes: see the package docstring; B requests, P slots of a path, S segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.kernels.flash_decoding import LOG2_E, _attend_tile, _load_heads
from specvlm.engine.kernels.launch import Narrow, Tile, options_of, split, to_8_bits

CHUNK = 512  # slots of the shortest chunk; at 16,384 keys and 8 KV heads, 32 chunks fill an H200 once
LEAF = 128  # slots of a leaf; every row gathers its last leaf itself
MOST = 64  # maximum number of chunks of a row; beyond that, their length doubles
PAIRS, STAGES, WIDE_STAGES = True, 3, 2
ROWS = 64  # rows of every program, padded if need be: fewer would not use wgmma, which rounds differently
LONGEST = 2**20  # slots: the merge looks for the highest of 4 * MOST segments at once
TILE = 64  # keys per step
MERGED = 32  # segments per step of the merge


@triton.jit
def _chunk_of(n, CHUNK: tl.constexpr, MOST: tl.constexpr):
    """Compute the length in slots of a chunk, for rows with n keys."""
    chunk = n * 0 + CHUNK
    for _ in tl.static_range(12):
        chunk = tl.where(n > chunk * MOST, chunk * 2, chunk)
    return chunk


@triton.jit
def _segments_of(n, chunk, LEAF: tl.constexpr):
    """Count the segments of n keys."""
    return n // chunk + (n % chunk + LEAF - 1) // LEAF


@triton.jit
def _store_part(out_ptr, lse_ptr, to, ok, m, total, acc, D: tl.constexpr, DP: tl.constexpr):
    """Store a segment's attention output for some rows, and its log-sum-exp (base 2)."""
    safe = tl.where(total > 0, total, 1.0)
    d = tl.arange(0, DP)
    tl.store(out_ptr + to[:, None] * D + d[None, :], acc / safe[:, None], mask=ok[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + to, m + tl.log2(safe), mask=ok)


@triton.jit
def _own_segment(
    q_ptr, k_ptr, v_ptr, ways_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, node, back, head, Q, P, scale,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, LEAF: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Attend to a row's segment `back` (0 is its last), if that ends after `base`: gather keys along the row's path."""
    G: tl.constexpr = H // J
    n = base + tl.load(depth_ptr + node).to(tl.int32) + 1
    chunk = _chunk_of(n, CHUNK, MOST)
    whole = n // chunk
    part = _segments_of(n, chunk, LEAF) - 1 - back
    lo = tl.where(part < whole, part * chunk, whole * chunk + (part - whole) * LEAF)
    hi = tl.where(part < whole, lo + chunk, tl.minimum(lo + LEAF, n))
    if (part >= 0) & (hi > base):
        r = tl.arange(0, R)
        ok = r < G
        q = _load_heads(q_ptr, node * H + head * G + r, ok, D, DP, False)
        m = tl.full((R,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((R,), dtype=tl.float32)
        acc = tl.zeros((R, DP), dtype=tl.float32)
        for start in range(lo, hi, BN):
            position = start + tl.arange(0, BN)
            inside = position < n
            ahead = position - base
            way = tl.load(ways_ptr + node * P + ahead, mask=inside & (ahead >= 0), other=0).to(tl.int32)
            slot = tl.where(ahead >= 0, base + way, position)
            k = _load_heads(k_ptr, slot, inside, D, DP, False)
            v = _load_heads(v_ptr, slot, inside, D, DP, False)
            seen = inside[None, :] & (r >= 0)[:, None]
            m, total, acc = _attend_tile(q, k, v, seen, m, total, acc, scale, True, False)
        _store_part(out_ptr, lse_ptr, (rows + part * J) * (Q * G) + node * G + r, ok, m, total, acc, D, DP)


@triton.jit
def _shared_segment(
    q, k_ptr, v_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, part, chunk, row, ok, Q, scale,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, LEAF: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Attend to segment `part`, if it ends at or before `base`, for those of a block's rows with this chunk length."""
    whole = base // chunk
    lo = tl.where(part < whole, part * chunk, whole * chunk + (part - whole) * LEAF)
    hi = lo + tl.where(part < whole, chunk, LEAF)
    if hi <= base:
        m = tl.full((R,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((R,), dtype=tl.float32)
        acc = tl.zeros((R, DP), dtype=tl.float32)
        for start in range(lo, hi, BN):
            k = _load_heads(k_ptr, start + tl.arange(0, BN), True, D, DP, True)
            v = _load_heads(v_ptr, start + tl.arange(0, BN), True, D, DP, True)
            m, total, acc = _attend_tile(q, k, v, True, m, total, acc, scale, False, False)
        # For rows past the end of the chunk, a leaf is part of that chunk: do not store it.
        n = base + tl.load(depth_ptr + row // G, mask=ok, other=0).to(tl.int32) + 1
        theirs = ok & (_chunk_of(n, CHUNK, MOST) == chunk) & ((part < whole) | (n // chunk == whole))
        _store_part(out_ptr, lse_ptr, (rows + part * J) * (Q * G) + row, theirs, m, total, acc, D, DP)


@triton.jit
def _block(
    q_ptr, k_ptr, v_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, part, first, share, head, Q, P, scale,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, LEAF: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Attend to segment `part` from the `share` rows of a block that start at `first`."""
    G: tl.constexpr = H // J
    row = first + tl.arange(0, R)
    ok = row < tl.minimum(first + share, Q * G)
    q = _load_heads(q_ptr, (row // G) * H + head * G + row % G, ok, D, DP, False)
    small = _chunk_of(base + 1, CHUNK, MOST)
    large = _chunk_of(base + P, CHUNK, MOST)
    _shared_segment(
        q, k_ptr, v_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, part, small, row, ok, Q, scale,
        J, G, D, DP, R, BN, CHUNK, LEAF, MOST,
    )  # fmt: skip
    if large > small:  # the pass crosses a change of chunk length
        _shared_segment(
            q, k_ptr, v_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, part, large, row, ok, Q, scale,
            J, G, D, DP, R, BN, CHUNK, LEAF, MOST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P"])  # with P = 1, base + P is base + 1, and the compiler fails on the dead branch
def _path_kernel(
    q_ptr, k_ptr, v_ptr, ways_ptr, depth_ptr, base_ptr, out_ptr, lse_ptr, Q, P, S, T, stride_b, capacity, scale, share, blocks, wide,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, LEAF: tl.constexpr, MOST: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend to all segments. Grid (J, S blocks + T Q, B): shared segments by block, then each row's last T segments."""
    head, job, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    base = tl.load(base_ptr + request).to(tl.int32)
    at = request.to(tl.int64) * stride_b + head.to(tl.int64) * capacity * D
    k_ptr += at
    v_ptr += at
    q_ptr += request.to(tl.int64) * Q * H * D
    depth_ptr += request * Q
    rows = request.to(tl.int64) * S * J + head  # of part 0
    shared = S * blocks
    if job >= shared:
        job -= shared
        ways_ptr += request.to(tl.int64) * Q * P
        _own_segment(
            q_ptr, k_ptr, v_ptr, ways_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, job // T, job % T, head, Q, P, scale,
            H, J, D, DP, R, BN, CHUNK, LEAF, MOST,
        )  # fmt: skip
    else:
        block, part = job % blocks, job // blocks
        if WIDE:
            if block < wide:
                _block(
                    q_ptr, k_ptr, v_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, part, block * share, share, head, Q, P, scale,
                    H, J, D, DP, 2 * R, BN, CHUNK, LEAF, MOST,
                )  # fmt: skip
            else:
                _block(
                    q_ptr, k_ptr, v_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, part, wide * share, R, head, Q, P, scale,
                    H, J, D, DP, R, BN, CHUNK, LEAF, MOST,
                )  # fmt: skip
        else:
            _block(
                q_ptr, k_ptr, v_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, part, block * share, share, head, Q, P, scale,
                H, J, D, DP, R, BN, CHUNK, LEAF, MOST,
            )  # fmt: skip


@triton.jit
def _merge_path_kernel(
    part_ptr, lse_ptr, depth_ptr, base_ptr, y_ptr, ys_ptr, Q, S,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, CHUNK: tl.constexpr,
    LEAF: tl.constexpr, MOST: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the segments of each row. Grid (Q, H, B).

    NARROW: store y in 8 bits, with a scale per head and row.
    """
    row, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // J
    d = tl.arange(0, DP)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.load(base_ptr + request).to(tl.int32) + tl.load(depth_ptr + request * Q + row).to(tl.int32) + 1
    count = _segments_of(n, _chunk_of(n, CHUNK, MOST), LEAF)
    first = (request.to(tl.int64) * S * J + head // G) * (Q * G) + row * G + head % G
    step = J * Q * G
    every = tl.arange(0, 4 * MOST)
    highest = tl.max(tl.load(lse_ptr + first + every * step, mask=every < count, other=float("-inf")), 0)
    y = tl.zeros((DP,), dtype=tl.float32)
    total = 0.0
    for start in range(0, count, BS):
        s = start + tl.arange(0, BS)
        at = first + s * step
        weight = tl.exp2(tl.load(lse_ptr + at, mask=s < count, other=float("-inf")) - highest)
        part = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=(s < count)[:, None] & (d < D)[None, :], other=0.0)
        y += tl.sum(part * weight[:, None], 0)
        total += tl.sum(weight, 0)
    y /= total
    out = (request * Q + row) * H + head
    if NARROW:
        narrow, narrow_scale = to_8_bits(y[:, None], y_ptr)
        tl.store(y_ptr + out * D + d[:, None], narrow)
        tl.store(ys_ptr + out + tl.arange(0, 1), narrow_scale)
    else:
        tl.store(y_ptr + out * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def segments_for(slots: int, chunk: int = CHUNK) -> int:
    """Return an upper bound on the number of segments of a row with at most `slots` keys."""
    if slots <= chunk * MOST:
        return slots // chunk + chunk // LEAF
    while slots > chunk * MOST:
        chunk *= 2
    return MOST + chunk // LEAF


def path_attention(
    q_QHD: Tensor,
    keys: Tensor,
    values: Tensor,
    base_B: Tensor,
    depths_Q: Tensor,
    ways_QP: Tensor,
    scale: float,
    kind: str = "full",
    chunk: int = CHUNK,
) -> Tensor | Narrow:
    """Attend from each row to the first `base` slots and its own path, bit-identical to a pass of one row.

    Args:
        q_QHD: (Q, H, D) queries, request by request, with equally many rows each.
        keys: (J, C, D) for one request, or (B, J, C, D).
        values: In the shape of `keys`.
        base_B: (B,) number of slots that all rows of a request see.
        depths_Q: (Q,) number of rows above each row on its path.
        ways_QP: (Q, P) rows on each row's path, from the first row of the tree to the row itself; the rest is not read.
        scale: Factor of the scores before the softmax.
        kind: Storage type of the next layer's weights.
        chunk: Length of the shortest chunk; only tests set it.

    Returns:
        (Q, H * D) outputs, in 8 bits unless `kind` is "full".

    Raises:
        ValueError: The cache has more than LONGEST slots, or a KV head serves more than ROWS query heads.
    """
    requests, (rows, heads, width) = base_B.numel(), q_QHD.shape
    rows //= requests
    kv_heads, capacity, _ = keys.shape[-3:]
    if capacity > LONGEST or heads > ROWS * kv_heads:
        raise ValueError(f"attention over {capacity} slots with {heads} heads on {kv_heads}: at most {LONGEST}, {ROWS} on each")
    group_rows, most = rows * (heads // kv_heads), segments_for(capacity, chunk)
    blocks, padded = triton.cdiv(group_rows, ROWS), triton.next_power_of_2(width)
    wide = blocks // 2 if PAIRS else 0
    share = triton.cdiv(group_rows, blocks)
    if wide:
        share = 2 * ROWS if blocks % 2 else triton.cdiv(group_rows, wide)
        blocks = triton.cdiv(blocks, 2)
    device, row_bytes = q_QHD.device, padded * q_QHD.element_size()
    part = torch.empty(requests, most, kv_heads, group_rows, width, dtype=torch.float32, device=device)
    lse = torch.empty(requests, most, kv_heads, group_rows, dtype=torch.float32, device=device)
    sizes = {"H": heads, "J": kv_heads, "D": width, "DP": padded, "CHUNK": chunk, "LEAF": LEAF, "MOST": MOST}
    longest = ways_QP.shape[1]
    own = 1 + triton.cdiv(longest, LEAF)  # segments that a path may reach into
    _path_kernel[(kv_heads, most * blocks + own * rows, requests)](
        q_QHD, keys, values, ways_QP, depths_Q, base_B, part, lse,
        rows, longest, most, own, keys.stride(0) if keys.ndim == 4 else 0, capacity, scale * LOG2_E,
        share, blocks, wide, R=ROWS, BN=TILE, WIDE=wide > 0, **sizes,
        **options_of(Tile(warps=4, stages=WIDE_STAGES if wide else STAGES), 2 * TILE * row_bytes, (2 if wide else 1) * ROWS * row_bytes),
    )  # fmt: skip
    y = torch.empty(len(q_QHD), heads * width, dtype=q_QHD.dtype, device=device) if kind == "full" else None
    out = Narrow.empty(len(q_QHD), heads * width, kind, device) if y is None else y
    _merge_path_kernel[(rows, heads, requests)](
        part, lse, depths_Q, base_B, *split(out), rows, most, BS=MERGED, NARROW=y is None, **sizes,
        **options_of(Tile(warps=1, stages=3)),
    )  # fmt: skip
    return out
