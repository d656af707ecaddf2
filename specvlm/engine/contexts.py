"""Tables that tell kernels where the rows of a joined pass of several requests are.

Each request keeps its own caches. The tables hold their addresses, so a captured pass serves any caches: passes are
captured per `Shape`, not per request.

Shape suffixes: B requests, Q rows of the pass, P rows on the longest path, N blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass

STEP = 8  # rows are padded to a multiple of it, so that few programs are captured
SLOTS = 4096  # capacities are rounded up to a multiple of it, to capture few programs
UNIT = 16  # bytes; caches begin at multiples of it, so that the kernels may load 16 bytes at once
CHUNK = 512  # slots of the shortest chunk; at 16,384 keys and 8 KV heads, 32 chunks fill an H200 once
LEAF = 128  # slots of a leaf (see `kernels/path_decoding.py`); every row gathers its last leaf itself
MOST = 64  # maximum number of chunks of a row; beyond that, their length doubles
EARLY = 32  # MOST for the shortest chunks, from HEADS KV heads on: many rows then store and merge fewer partial results
HEADS = 8  # KV heads whose EARLY chunks fill an H200; with 4, a row alone would take a third longer
BLOCK = 64  # query rows of a KV head that read the shared keys together: rows of every program of the kernel


@dataclass(frozen=True, eq=False)
class Layout:
    """Tables of a joined pass that depend only on the shapes of its parts, not on caches or tokens.

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
    """A layout, and where the caches of its requests are.

    Attributes:
        anchor: Tensor of the caches' dtype; addresses are relative to its address.
        table_B4: (B, 4) int64: addresses of the keys and of the values relative to the anchor's, in units of UNIT
            bytes; slots of the cache; slot `base`.
        layout: Tables that do not depend on the caches.
        longest: Upper bound on the slots of a cache.
        kv_heads: Number of KV heads.
    """

    anchor: Tensor
    table_B4: Tensor
    layout: Layout
    longest: int
    kv_heads: int


def addresses(caches: Sequence[KVCache], anchor: Tensor, count: int) -> list[int]:
    """List `Contexts.table_B4` without its last column, row by row, padded to `count` requests.

    The caches are on one device, and their dtype is the anchor's.
    """
    start, found = anchor.data_ptr(), list[int]()
    for cache in caches:
        ((keys, values),) = cache.starts
        found += ((keys - start) // UNIT, (values - start) // UNIT, cache.capacity)
    return found + [0] * (3 * count - len(found))


def blocks_of(rows: Sequence[int], group: int, count: int) -> Tensor:
    """Divide the rows of each request into blocks of at most BLOCK query rows of a KV head.

    Args:
        rows: Rows of each request.
        group: Query heads of a KV head.
        count: Number of blocks to pad to.

    Returns:
        (N, 3) int32 table, as in `Layout.blocks_N3`.
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


class Shape(NamedTuple):
    """Numbers that a joined pass is captured for: rows, requests, slots of a path, slots of a cache."""

    rows: int
    requests: int
    path: int
    longest: int

    @classmethod
    def of(cls, passes: Sequence[Pass]) -> Shape:
        """Return the shape that some passes need together, with each number rounded up."""
        return cls(
            rounded(sum(map(len, passes)), STEP),
            _power_of_2(len(passes)),
            max(8, _power_of_2(max(one.at + len(one) for one in passes))),
            rounded(max(one.cache.capacity for one in passes), SLOTS),
        )


def frame_of(shape: Shape, counts: Sequence[int], group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make the tables that need only the rows of each request: the requests of rows, and the blocks.

    group: Query heads of a KV head.
    """
    owners = [request for request, count in enumerate(counts) for _ in range(count)]
    owners += [-1] * (shape.rows - len(owners))
    blocks = blocks_of(counts, group, blocks_for(shape.rows, shape.requests, group))
    return torch.tensor(owners, dtype=torch.int32, device=device), blocks.to(device)


def layout_of(shape: Shape, passes: Sequence[Pass], frame: tuple[Tensor, Tensor]) -> Layout:
    """Make the tables of some passes, padded to a shape. Copies nothing from the host if `passes` are on the device."""
    device, columns = frame[0].device, list[tuple[Tensor, Tensor, Tensor, Tensor]]()
    for one in passes:
        local_Q = torch.arange(one.at, one.at + len(one), device=device)
        above_Q, ways_QT = local_Q, torch.arange(one.at + len(one), device=device).expand(len(one), -1)
        if one.seen_QT is not None:
            seen_QT = one.seen_QT.to(device) != 0
            above_Q, ways_QT = seen_QT.sum(1) - 1, paths_of(seen_QT)
        ways_QP = pad(ways_QT, (0, shape.path - ways_QT.shape[1]))
        columns.append((local_Q, on_device(one.depths_Q, device), above_Q, ways_QP))
    spare = shape.rows - sum(map(len, passes))
    *flat, ways_QP = map(torch.cat, zip(*columns, strict=True))
    local_Q, depth_Q, above_Q = (pad(column_Q, (0, spare)) for column_Q in flat)
    return Layout(frame[0], local_Q, depth_Q, above_Q, pad(ways_QP, (0, 0, 0, spare)), frame[1])


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on a device, during which nothing may be copied from the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def early_of(kv_heads: int) -> int:
    """Return the maximum number of chunks of the shortest length per row; with more keys, its chunks are longer."""
    return EARLY if kv_heads >= HEADS else MOST


def segments_for(slots: int, chunk: int = CHUNK, early: int = MOST) -> int:
    """Return an upper bound on the number of segments of a row with at most `slots` keys."""
    found, limit = 0, early
    while True:
        found = max(found, min(slots // chunk, limit) + chunk // LEAF)
        if slots <= chunk * limit:
            return found
        chunk, limit = 2 * chunk, MOST


def rounded(number: int, step: int) -> int:
    """Round up to a multiple of `step`."""
    return -(-number // step) * step


def _power_of_2(number: int) -> int:
    """Round up to a power of two."""
    return 1 << (number - 1).bit_length()


def paths_of(seen_MM: Tensor) -> Tensor:
    """List the nodes that each node sees, ascending. Returns (M, M); a row ends with padding."""
    return seen_MM.logical_not().to(torch.int64).argsort(stable=True)


def on_device(numbers: int | Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Put integers on the device; tensors are returned unchanged. Copies nothing from the host during a capture."""
    if isinstance(numbers, Tensor):
        return numbers
    if isinstance(numbers, range):
        return torch.arange(numbers.start, numbers.stop, numbers.step, device=device)
    each = [numbers] if isinstance(numbers, int) else numbers
    if len(each) > 1 and not capturing(device):
        return torch.tensor([*each], device=device)
    return torch.cat([torch.full((1,), number, device=device) for number in each])
