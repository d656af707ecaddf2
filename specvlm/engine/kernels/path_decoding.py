"""Path attention: bit-exact attention, whose result for a row depends only on the row's own path.

The n keys of a row, in the order of its path, are split into segments that depend only on n and the number of KV heads:
full chunks, then leaves of LEAF slots, the last of which may be shorter. A chunk has CHUNK slots. Its length doubles
once a row would have more than EARLY chunks (from HEADS KV heads on), and again whenever it would have more than MOST.
Segments that end below `base` are contiguous in the cache, and blocks of rows read them together. A row's other
segments are gathered along its path, with the same arithmetic in the same order. Segments are merged in order. So the
number of rows, the tree, the cache's capacity and other requests in the pass do not change a single bit
(tests/test_exact_gpu.py).

Shape suffixes: see the package docstring; P slots of a path, S segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.contexts import CHUNK, LEAF, MOST, Contexts, early_of, segments_for
from specvlm.engine.kernels.flash_decoding import LOG2_E, _attend_tile, _load_heads
from specvlm.engine.kernels.launch import Narrow, Tile, context_of, options_of, split, to_8_bits

ROWS = 64  # rows of every program, padded if need be: fewer would not use wgmma, which rounds differently
LONGEST = 2**20  # maximum number of slots: the merge finds the highest of at most 4 * MOST segments in one step
TILE = 64  # keys per step
MERGED = 32  # segments per step of the merge


@triton.jit
def _chunk_of(n, CHUNK: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr):
    """Compute the length in slots of a chunk, for rows with n keys."""
    chunk = tl.where(n > CHUNK * EARLY, 2 * CHUNK, CHUNK)
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
    CHUNK: tl.constexpr, LEAF: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Attend to a row's segment `back` (0 is its last), if that ends after `base`: gather keys along the row's path."""
    G: tl.constexpr = H // J
    n = base + tl.load(depth_ptr + node).to(tl.int32) + 1
    chunk = _chunk_of(n, CHUNK, EARLY, MOST)
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
    CHUNK: tl.constexpr, LEAF: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr,
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
        theirs = ok & (_chunk_of(n, CHUNK, EARLY, MOST) == chunk) & ((part < whole) | (n // chunk == whole))
        _store_part(out_ptr, lse_ptr, (rows + part * J) * (Q * G) + row, theirs, m, total, acc, D, DP)


# P: with P = 1, base + P is base + 1, and the compiler fails on the dead branch.
@triton.jit(do_not_specialize=["P", "before", "layer"])
def _path_kernel(
    q_ptr, k_ptr, v_ptr, ways_ptr, depth_ptr, base_ptr, request_ptr, block_ptr, out_ptr, lse_ptr,
    Q, P, T, capacity, layer, scale, share, blocks, before,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, LEAF: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr, MANY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend to all segments: each row's last T, and shared ones by block. Grid (J, T * Q + segments * blocks).

    before: number of programs per KV head for shared segments that start before the programs for rows' own segments.
    MANY: rows belong to several requests (see `engine/contexts.py`); base_ptr then is their table, k_ptr and v_ptr are
    its anchor, and blocks come from a table too.
    """
    head, job = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    G: tl.constexpr = H // J
    rows = head.to(tl.int64)  # of part 0
    own = job - before
    if (own >= 0) & (own < T * Q):
        node = own // T
        live = True
        if MANY:
            request = tl.load(request_ptr + node)
            live = request >= 0
            keys, values, base, slots = context_of(base_ptr, k_ptr, v_ptr, tl.maximum(request, 0), layer, J, D)
        else:
            keys, values, base, slots = k_ptr, v_ptr, tl.load(base_ptr).to(tl.int32), capacity
        if live:
            at = head.to(tl.int64) * slots * D
            _own_segment(
                q_ptr, keys + at, values + at, ways_ptr, depth_ptr, out_ptr, lse_ptr, rows, base, node, own % T, head, Q, P,
                scale, H, J, D, DP, R, BN, CHUNK, LEAF, EARLY, MOST,
            )  # fmt: skip
    else:
        shared = tl.where(own < 0, job, job - T * Q)
        part = shared // blocks
        block = shared % blocks
        if MANY:
            request = tl.load(block_ptr + block * 3)
            first = tl.load(block_ptr + block * 3 + 1)
            end = tl.load(block_ptr + block * 3 + 2)
            keys, values, base, slots = context_of(base_ptr, k_ptr, v_ptr, request, layer, J, D)
            base = tl.where(end == first, 0, base)  # padding: no segment ends there
        else:
            first = block * share
            end = tl.minimum(first + share, Q * G)
            keys, values, base, slots = k_ptr, v_ptr, tl.load(base_ptr).to(tl.int32), capacity
        at = head.to(tl.int64) * slots * D
        row = first + tl.arange(0, R)
        ok = row < end
        q = _load_heads(q_ptr, (row // G) * H + head * G + row % G, ok, D, DP, False)
        small = _chunk_of(base + 1, CHUNK, EARLY, MOST)
        large = _chunk_of(base + P, CHUNK, EARLY, MOST)
        _shared_segment(
            q, keys + at, values + at, depth_ptr, out_ptr, lse_ptr, rows, base, part, small, row, ok, Q, scale,
            J, G, D, DP, R, BN, CHUNK, LEAF, EARLY, MOST,
        )  # fmt: skip
        if large > small:  # the pass crosses a change of chunk length
            _shared_segment(
                q, keys + at, values + at, depth_ptr, out_ptr, lse_ptr, rows, base, part, large, row, ok, Q, scale,
                J, G, D, DP, R, BN, CHUNK, LEAF, EARLY, MOST,
            )  # fmt: skip


@triton.jit
def _merge_path_kernel(
    part_ptr, lse_ptr, depth_ptr, base_ptr, request_ptr, y_ptr, ys_ptr, Q,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, CHUNK: tl.constexpr,
    LEAF: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr, NARROW: tl.constexpr, MANY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the segments of each row. Grid (Q, H).

    NARROW: store y in 8 bits, with a scale per head and row. MANY: as in `_path_kernel`.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = H // J
    d = tl.arange(0, DP)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.load(depth_ptr + row).to(tl.int32) + 1
    if MANY:
        request = tl.load(request_ptr + row)
        n = tl.where(request < 0, 0, n + tl.load(base_ptr + tl.maximum(request, 0) * 4 + 3).to(tl.int32))
    else:
        n += tl.load(base_ptr).to(tl.int32)
    count = _segments_of(n, _chunk_of(n, CHUNK, EARLY, MOST), LEAF)
    first = (head // G).to(tl.int64) * (Q * G) + row * G + head % G
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
    if MANY:
        total = tl.where(n == 0, 1.0, total)  # padding has no segments
    y /= total
    out = row * H + head
    if NARROW:
        narrow, narrow_scale = to_8_bits(y[:, None], y_ptr)
        tl.store(y_ptr + out * D + d[:, None], narrow)
        tl.store(ys_ptr + out + tl.arange(0, 1), narrow_scale)
    else:
        tl.store(y_ptr + out * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def path_attention(
    q_QHD: Tensor,
    keys: Tensor,
    values: Tensor,
    base: Tensor,
    depths_Q: Tensor,
    ways_QP: Tensor,
    scale: float,
    kind: str = "full",
    chunk: int = CHUNK,
) -> Tensor | Narrow:
    """Attend from each row to the first `base` slots and its own path, bit-identical to a pass of one row.

    Args:
        q_QHD: (Q, H, D) queries.
        keys: (J, C, D).
        values: (J, C, D).
        base: (1,) number of slots that all rows see.
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
    kv_heads, capacity, _ = keys.shape
    group_rows = len(q_QHD) * (q_QHD.shape[1] // kv_heads)
    blocks = triton.cdiv(group_rows, ROWS)
    tables = (ways_QP, depths_Q, base, base, base)
    return _launch(q_QHD, (keys, values), tables, kv_heads, capacity, 0, blocks, scale, kind, chunk, many=False)


def path_attention_many(q_QHD: Tensor, contexts: Contexts, layer: int, scale: float, kind: str = "full") -> Tensor | Narrow:
    """Like `path_attention`, but for rows of several requests: each attends to its own request's cache."""
    layout, anchor = contexts.layout, contexts.anchor
    tables = (layout.ways_QP, layout.above_Q, contexts.table_B4, layout.request_Q, layout.blocks_N3)
    blocks, kv_heads = len(layout.blocks_N3), contexts.kv_heads
    return _launch(q_QHD, (anchor, anchor), tables, kv_heads, contexts.longest, layer, blocks, scale, kind, CHUNK, many=True)


def _launch(
    q_QHD: Tensor, both: tuple[Tensor, Tensor], tables: tuple[Tensor, ...], kv_heads: int, capacity: int, layer: int,
    blocks: int, scale: float, kind: str, chunk: int, many: bool,
) -> Tensor | Narrow:  # fmt: skip
    """Launch both kernels. both: keys and values, or the anchor. tables: arguments of `_path_kernel` from ways_ptr."""
    rows, heads, width = q_QHD.shape
    if capacity > LONGEST or heads > ROWS * kv_heads:
        raise ValueError(f"attention over {capacity} slots with {heads} heads on {kv_heads}: at most {LONGEST}, {ROWS} on each")
    early = early_of(kv_heads)
    group_rows, most = rows * (heads // kv_heads), segments_for(capacity, chunk, early)
    device, padded = q_QHD.device, triton.next_power_of_2(width)
    part = torch.empty(most, kv_heads, group_rows, width, dtype=torch.float32, device=device)
    lse = torch.empty(most, kv_heads, group_rows, dtype=torch.float32, device=device)
    sizes = {"H": heads, "J": kv_heads, "D": width, "DP": padded, "CHUNK": chunk, "LEAF": LEAF, "EARLY": early, "MOST": MOST}
    sizes |= {"MANY": many}
    (ways, depths, base, requests, _), row_bytes = tables, padded * q_QHD.element_size()
    longest = ways.shape[1]
    own = 1 + triton.cdiv(longest, LEAF)  # segments that a path may reach into
    # Short programs last, where that fills the second wave of the long ones; not tried with several requests.
    before = most * blocks if blocks > 1 and capacity > early * chunk and not many else 0
    _path_kernel[(kv_heads, own * rows + most * blocks)](
        q_QHD, *both, *tables, part, lse,
        rows, longest, own, capacity, layer, scale * LOG2_E, triton.cdiv(group_rows, blocks), blocks, before,
        R=ROWS, BN=TILE, **sizes,
        **options_of(Tile(warps=4, stages=3), 2 * TILE * row_bytes, ROWS * row_bytes),
    )  # fmt: skip
    y = torch.empty(rows, heads * width, dtype=q_QHD.dtype, device=device) if kind == "full" else None
    out = Narrow.empty(rows, heads * width, kind, device) if y is None else y
    _merge_path_kernel[(rows, heads)](
        part, lse, depths, base, requests, *split(out), rows, BS=MERGED, NARROW=y is None, **sizes,
        **options_of(Tile(warps=1, stages=3)),
    )  # fmt: skip
    return out
