"""Find the largest values of each row. Shape suffixes: see the package docstring."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.kernels.launch import Tile, options_of


@triton.jit
def _top_kernel(
    x_ptr, value_ptr, index_ptr, V, stride, from_ptr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Find the COUNT largest values of a block of a row, largest first, ties by index. Grid (Q, blocks).

    NESTED: x holds the winners of the blocks, and from_ptr their indices in the row.
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


def top(logits_QV: Tensor, count: int) -> Tensor:
    """Return (Q, count) int64 token ids of the largest logits, largest first, ties by token id."""
    rows, size = logits_QV.shape
    block = 4096
    blocks = triton.cdiv(size, block)
    device = logits_QV.device
    options = options_of(Tile(warps=8))
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
