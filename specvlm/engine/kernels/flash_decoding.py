"""Flash decoding: attention of few rows over a long prefix and a small tree.

Shape suffixes: see the package docstring.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.kernels.launch import Narrow, Tile, options_of, processors_of, split, to_8_bits, width_of

LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tile(q, k, v, seen, m, total, acc, scale, MASKED: tl.constexpr, IEEE: tl.constexpr):
    """Add a tile of keys to an online softmax in base 2: running maximum m, total weight, weighted values acc.

    seen: which keys each row sees, read only if MASKED.
    """
    if IEEE:  # noqa: SIM108
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        score = tl.dot(q, tl.trans(k))
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    top = tl.maximum(m, tl.max(score, 1) * scale)
    safe = top
    if MASKED:
        safe = tl.where(top == float("-inf"), 0.0, top)  # the row has not seen any key yet
    weight = tl.exp2(score * scale - safe[:, None])
    shrink = tl.exp2(m - safe)
    total = total * shrink + tl.sum(weight, 1)
    if IEEE:
        acc = tl.dot(weight, v, acc * shrink[:, None], input_precision="ieee")
    else:
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
    return top, total, acc


@triton.jit
def _load_heads(ptr, rows, ok, D: tl.constexpr, DP: tl.constexpr, ALL: tl.constexpr):
    """Load (n, DP) rows of a head, zero-padded from width D to DP. ok: (n,) which rows exist; not read if ALL do."""
    d = tl.arange(0, DP)
    at = ptr + rows[:, None] * D + d[None, :]
    if ALL:
        found = tl.load(at) if D == DP else tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        there = ok[:, None] if D == DP else ok[:, None] & (d < D)[None, :]
        found = tl.load(at, mask=there, other=0.0)
    return found


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr, base_ptr, out_ptr, lse_ptr, Q, T, capacity, scale, share,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    IEEE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend from a block of a KV head's query rows to one part of the keys. Grid (J, parts, blocks).

    A block has at most `share` rows, and `share` is at most R. The full tiles of the first `base` slots are split into
    parts of equally many tiles, of which the last ones may be short or empty. The last part also takes the rest of
    those slots, and the T slots of the tree.
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
    d = tl.arange(0, DP)
    offs_n = tl.arange(0, BN)
    r = first + tl.arange(0, R)
    ok = r < tl.minimum(first + share, Q * G)
    # Row r of a KV head is query head `head * G + r % G` of row r // G of the pass.
    q = _load_heads(q_ptr, (r // G) * H + head * G + r % G, ok, D, DP, False)
    m = tl.full((R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((R,), dtype=tl.float32)
    acc = tl.zeros((R, DP), dtype=tl.float32)
    whole = base // BN * BN
    step = tl.cdiv(whole // BN, parts) * BN
    lo = tl.minimum(part * step, whole)
    hi = tl.minimum(lo + step, whole)
    for start in range(lo, hi, BN):
        k = _load_heads(k_ptr, start + offs_n, True, D, DP, True)
        v = _load_heads(v_ptr, start + offs_n, True, D, DP, True)
        m, total, acc = _attend_tile(q, k, v, True, m, total, acc, scale, False, IEEE)
    if part == parts - 1:
        for start in range(whole, base + T, BN):
            slots = start + offs_n
            node = slots - base
            inside = node < T
            k = _load_heads(k_ptr, slots, inside, D, DP, False)
            v = _load_heads(v_ptr, slots, inside, D, DP, False)
            marked = tl.load(
                seen_ptr + (r // G)[:, None] * T + node[None, :], mask=ok[:, None] & (inside & (node >= 0))[None, :], other=0
            )
            seen = (marked != 0) | (node < 0)[None, :]
            m, total, acc = _attend_tile(q, k, v, seen, m, total, acc, scale, True, IEEE)
    safe = tl.where(total > 0, total, 1.0)
    at = (part * J + head) * (Q * G) + r
    tl.store(out_ptr + at[:, None].to(tl.int64) * D + d[None, :], acc / safe[:, None], mask=ok[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + at, m + tl.log2(safe), mask=ok)  # -inf if no key was seen


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, y_ptr, ys_ptr, Q, S,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, NARROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Merge the S parts of an attention by their log-sum-exp (base 2). Grid (Q, H).

    NARROW: store y in 8 bits, with a scale per head and row.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    G: tl.constexpr = H // J
    d = tl.arange(0, DP)
    s = tl.arange(0, BS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    inside = s < S
    at = (s * J + head // G) * (Q * G) + row * G + head % G
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    there = inside[:, None] & (d < D)[None, :]
    part = tl.load(part_ptr + at[:, None].to(tl.int64) * D + d[None, :], mask=there, other=0.0)
    y = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    at = y_ptr + (row * H + head) * D + d
    if NARROW:
        narrow, scale = to_8_bits(y[:, None], y_ptr)
        tl.store(at[:, None], narrow)
        tl.store(ys_ptr + row * H + head + tl.arange(0, 1), scale)
    else:
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=d < D)


def row_blocks(rows: int) -> tuple[int, int]:
    """Split the query rows of a KV head into blocks of at most R rows. Returns R and the number of blocks.

    Blocks read the same keys at the same time, so all but one hit the L2 cache. One program of 128 rows has a third
    more throughput than two of 64, so R is 128. It is smaller for up to 64 rows, and 64 for 129 to 192 rows, where
    three blocks save padding.
    """
    blocks = triton.cdiv(rows, 64)
    return (min(64, width_of(rows)), blocks) if blocks in (1, 3) else (128, triton.cdiv(rows, 128))


def attention(
    q_QHD: Tensor, keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, seen_QT: Tensor, scale: float, kind: str = "full"
) -> Tensor | Narrow:
    """Attend from each row to the first `base` slots and to those of the next T that `seen` (int8) marks.

    Returns (Q, H * D). Flash decoding: keys are split into parts, which are merged by their log-sum-exp. The mask
    applies to the last part only.
    """
    rows, heads, width = q_QHD.shape
    kv_heads, capacity, _ = keys_JCD.shape
    group_rows = rows * (heads // kv_heads)
    many, blocks = row_blocks(group_rows)
    # Fill the device once, with one program per multiprocessor. Use two where small blocks keep the tensor cores busy,
    # and where one would wait for memory: a row of the 32B over 131,072 keys takes 57 us a layer more in 16 parts than
    # in 32.
    beside, processors = many <= 64 and blocks > 1, processors_of(q_QHD.device)
    two = beside or (many <= 64 and processors // kv_heads < 32)
    parts = max(1, processors * (2 if two else 1) // (kv_heads * blocks))
    device = q_QHD.device
    sizes = {"H": heads, "J": kv_heads, "D": width, "DP": triton.next_power_of_2(width)}
    part = torch.empty(parts, kv_heads, group_rows, width, dtype=torch.float32, device=device)
    lse = torch.empty(parts, kv_heads, group_rows, dtype=torch.float32, device=device)
    tile, keys = Tile(warps=8 if many > 64 else 4, stages=4 if beside else 3), 32 if beside else 64
    row_bytes = sizes["DP"] * q_QHD.element_size()
    _attention_kernel[(kv_heads, parts, blocks)](
        q_QHD, keys_JCD, values_JCD, seen_QT, base, part, lse,
        rows, seen_QT.shape[1], capacity, scale * LOG2_E, triton.cdiv(group_rows, blocks),
        **sizes, R=many, BN=keys, IEEE=q_QHD.dtype == torch.float32,
        **options_of(tile, 2 * keys * row_bytes, many * row_bytes),
    )  # fmt: skip
    y = torch.empty(rows, heads * width, dtype=q_QHD.dtype, device=device) if kind == "full" else None
    out = Narrow.empty(rows, heads * width, kind, device) if y is None else y
    _merge_kernel[(rows, heads)](
        part, lse, *split(out), rows, parts,
        **sizes, BS=triton.next_power_of_2(parts), NARROW=y is None,
        **options_of(Tile(warps=max(1, triton.next_power_of_2(parts) // 32))),
    )  # fmt: skip
    return out
