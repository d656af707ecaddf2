"""Compact a request's cache after a verdict, at an address read from the device.

Shape suffixes: see the package docstring.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specvlm.engine.kernels.launch import Tile, options_of


@triton.jit(do_not_specialize=["request", "P"])
def _move_kernel(
    anchor_ptr, where_ptr, request, base_ptr, path_ptr, P, D: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Move the row in slot base + path[i] to slot base + i. Grid (layers * KV heads, 2): keys, then values."""
    head, which = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    address = tl.load(where_ptr + request * 3 + which)
    capacity = tl.load(where_ptr + request * 3 + 2)
    store = anchor_ptr + address * 8 + head.to(tl.int64) * capacity * D
    base = tl.load(base_ptr)
    p = tl.arange(0, PP)
    d = tl.arange(0, DP)
    ok = (p < P)[:, None] & (d < D)[None, :]
    # A plugin's routine may compute any slot: stay within the cache.
    old = tl.minimum(tl.maximum(base + tl.load(path_ptr + p, mask=p < P, other=0), 0), capacity - 1)
    new = base + p
    rows = tl.load(store + old[:, None] * D + d[None, :], mask=ok)
    tl.debug_barrier()  # all rows are read before one is overwritten
    tl.store(store + new[:, None] * D + d[None, :], rows, mask=ok & ((new >= 0) & (new < capacity))[:, None])


def move(anchor: Tensor, where_3B: Tensor, request: int, base_1: Tensor, path_D: Tensor, heads: int, width: int) -> None:
    """Move rows of a request's cache in all layers: the row in slot base + path[i] goes to slot base + i.

    Args:
        anchor: Tensor of the cache's dtype, from which addresses are counted.
        where_3B: See `engine.contexts.addresses`.
        request: Number of the request.
        base_1: (1,) int64 slot.
        path_D: Ascending int64 rows, counted from `base`; none is smaller than its index.
        heads: Layers times KV heads.
        width: Width of a head.
    """
    _move_kernel[(heads, 2)](
        anchor, where_3B, request, base_1, path_D, len(path_D), D=width, DP=triton.next_power_of_2(width),
        PP=triton.next_power_of_2(len(path_D)), **options_of(Tile(warps=4)),
    )  # fmt: skip
