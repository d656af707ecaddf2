"""Where the rows of several requests' joined pass lie: tables that the kernels read from the device.

Requests keep caches of their own. The tables hold addresses, so a pass that was captured once serves any caches: what is
captured goes by the number of rows and of requests alone.

Shape suffixes: B requests, Q rows of the pass, P rows on the longest path, N blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.models.kv_cache import KVCache

UNIT = 16  # bytes; caches begin at multiples of it, so that the kernels may load 16 bytes at once
BLOCK = 64  # query rows of a KV head that read the shared keys together: rows of every program of the kernel


@dataclass(frozen=True, eq=False)
class Layout:
    """Tables of a joined pass that depend on the shapes of its parts alone, not on caches or tokens.

    Padding rows belong to request -1: they write nothing, and attend to nothing.

    Attributes:
        request_Q: (Q,) int32 request of each row.
        local_Q: (Q,) int64 slot of each row, relative to its request's base.
        depth_Q: (Q,) int64 rotary position of each row, relative to that of its request's base.
        above_Q: (Q,) int64 number of rows above each row on its path, from the base on.
        ways_QP: (Q, P) int64 slots on each row's path, relative to its request's base; the rest of a row is not read.
        blocks_N3: (N, 3) int32 of each block: its request, and its first and last query row of a KV head, the latter
            exclusive. Rows of a block share their request. Padding has no rows.
    """

    request_Q: Tensor
    local_Q: Tensor
    depth_Q: Tensor
    above_Q: Tensor
    ways_QP: Tensor
    blocks_N3: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All tables, in order."""
        return (self.request_Q, self.local_Q, self.depth_Q, self.above_Q, self.ways_QP, self.blocks_N3)


@dataclass(frozen=True, eq=False)
class Contexts:
    """A layout, with the caches of its requests.

    Attributes:
        anchor: Tensor of the caches' dtype; addresses are counted from its own.
        table_B4: (B, 4) int64: addresses of the keys and of the values relative to the anchor's, in units of UNIT bytes;
            slots of the cache; slot `base`.
        layout: What does not depend on the caches.
        longest: No cache has more slots.
        kv_heads: Number of KV heads.
    """

    anchor: Tensor
    table_B4: Tensor
    layout: Layout
    longest: int
    kv_heads: int


def addresses(caches: Sequence[KVCache], anchor: Tensor, count: int) -> list[int]:
    """List `Contexts.table_B4` without its last column, row by row, padded to `count` requests.

    Raises ValueError if a cache is not where the kernels could read it.
    """
    start, found = anchor.data_ptr(), list[int]()
    for cache in caches:
        for tensor in (cache.keys, cache.values):
            distance = tensor.data_ptr() - start
            if distance % UNIT or tensor.dtype != anchor.dtype or not tensor.is_contiguous():
                raise ValueError("a cache's tensors were replaced")
            found.append(distance // UNIT)
        found.append(cache.capacity)
    return found + [0] * (3 * count - len(found))


def blocks_of(rows: Sequence[int], group: int, count: int) -> Tensor:
    """Divide the rows of each request into blocks of at most BLOCK query rows of a KV head.

    Args:
        rows: Rows of each request.
        group: Query heads of a KV head.
        count: Number of blocks to pad to.
    """
    found, first = list[tuple[int, int, int]](), 0
    for request, own in enumerate(rows):
        parts = -(-own * group // BLOCK)
        share = -(-own * group // parts)
        for part in range(parts):
            found.append((request, first + part * share, first + min((part + 1) * share, own * group)))
        first += own * group
    return torch.tensor(found + [(0, 0, 0)] * (count - len(found)), dtype=torch.int32)


def blocks_for(rows: int, requests: int, group: int) -> int:
    """Return an upper bound on the number of blocks of a pass."""
    return requests + rows * group // BLOCK
