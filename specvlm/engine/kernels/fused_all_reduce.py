"""All-reduce of a linear layer's output, fused with residual add and RMSNorm.

Shape suffixes: see the package docstring; R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.kernels.launch import GROUP, Narrow, Tile, options_of, split
from specvlm.engine.kernels.norm_rope import add_norm, store_normed, whole
from specvlm.parallel.ranks import ProcessGroup


@triton.jit
def _all_reduce_norm_kernel(
    x_ptr, part_ptr, weight_ptr, sum_ptr, y_ptr, ys_ptr, shares_ptr, marks_ptr, turns_ptr, rank, Q, K, eps,
    S: tl.constexpr, R: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Like `_add_norm_kernel`, but sum the parts over ranks. Grid (Q,): the programs of a row on all ranks synchronise.

    Each program writes its share to a buffer that all ranks can read. It marks the row as ready on every other rank
    with the turn number, waits for their marks, and sums the shares in rank order, so all ranks get the same sum. Two
    buffers alternate by turn: a rank that marks the next turn has finished reading the buffers of this one.
    """
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    ok = offs < K
    weight = tl.load(weight_ptr + offs, mask=ok, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kind = sum_ptr.dtype.element_ty
    turn = tl.load(turns_ptr + row) + 1
    mine = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(S):
        mine += tl.load(part_ptr + (s * Q + row) * K + offs, mask=ok, other=0.0)
    at = ((turn & 1) * ROOM + row) * K + offs
    mine_ptr = tl.multiple_of(tl.load(shares_ptr + rank).to(tl.pointer_type(kind)), 16)
    tl.store(mine_ptr + at, mine.to(kind), mask=ok)
    x = tl.load(x_ptr + row * K + offs, mask=ok, other=0.0).to(tl.float32)
    tl.debug_barrier()  # the whole row is written before a thread marks it as ready
    for step in tl.static_range(1, R):
        other = (rank + step) % R
        mark = tl.load(marks_ptr + other).to(tl.pointer_type(tl.int32)) + rank * ROOM + row
        tl.atomic_xchg(mark, turn, sem="release", scope="sys")
    marked = tl.load(marks_ptr + rank).to(tl.pointer_type(tl.int32)) + row
    for step in tl.static_range(1, R):
        other = (rank + step) % R
        while tl.atomic_add(marked + other * ROOM, 0, sem="acquire", scope="sys") - turn < 0:  # turn numbers may wrap around
            pass
    tl.debug_barrier()
    added = tl.zeros((BLOCK,), dtype=tl.float32)
    for other in tl.static_range(R):
        share_ptr = tl.multiple_of(tl.load(shares_ptr + other).to(tl.pointer_type(kind)), 16)
        added += tl.load(share_ptr + at, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)  # bypass L1
    tl.store(turns_ptr + row, turn)
    x = (x + added.to(kind).to(tl.float32)).to(kind).to(tl.float32)
    store_normed(x, weight, sum_ptr, y_ptr, ys_ptr, row, offs, ok, K, eps, BLOCK, GROUP, NARROW)


def all_reduce_add_norm(
    ranks: ProcessGroup, x_QK: Tensor, parts_SQK: Tensor, weight_K: Tensor, eps: float, kind: str = "full"
) -> tuple[Tensor, Tensor | Narrow]:
    """Like `add_norm`, but sum the parts over ranks. Each rank rounds its sum first.

    Uses one fused kernel if the ranks share a buffer with room for the rows, else a separate all-reduce.
    """
    rows, width = x_QK.shape
    room = ranks.room(rows, width, x_QK.dtype, x_QK.device)
    if room is None:
        share = ranks.sum(whole(parts_SQK, torch.empty_like(x_QK)))
        return add_norm(x_QK, share[None], weight_K, eps, kind)
    total = torch.empty_like(x_QK)
    y = torch.empty_like(x_QK) if kind == "full" else Narrow.empty(rows, width, kind, x_QK.device)
    _all_reduce_norm_kernel[(rows,)](
        x_QK, parts_SQK, weight_K, total, *split(y), room.shares, room.marks, room.turns, ranks.rank, rows, width, eps,
        S=len(parts_SQK), R=ranks.size, ROOM=len(room.turns), BLOCK=triton.next_power_of_2(width), GROUP=GROUP,
        NARROW=kind != "full", **options_of(Tile(warps=16)),
    )  # fmt: skip
    return total, y
