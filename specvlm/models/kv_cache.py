"""Preallocated KV caches and the pool that reuses them.

Only this module and the losslessness check move rows inside a cache. The check must not share this code.

Shape suffixes: L layers, H KV heads, C slots, D head dimension (in `path_D`: nodes of a path), Q rows of a pass, K
slots to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


def pooled(slots: int) -> int:
    """Round a capacity up to a multiple of 256 slots, so that a slightly longer request can reuse the cache."""
    return -(-slots // 256) * 256


ROLES = 8  # maximum number of roles whose free caches a pool keeps, and of caches in one lease


class Shaped(Protocol):
    """Properties of a model that determine its cache's shape."""

    kv_heads: int
    head_dim: int

    @property
    def stages(self) -> Sequence[Any]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def new_cache(self, capacity: int) -> KVCache: ...


class Store(NamedTuple):
    """Keys and values of one pipeline stage's layers on its device, (L, 1, H, C, D) each."""

    keys: Tensor
    values: Tensor

    def move(self, base_1: Tensor, path_D: Tensor) -> None:
        """Move the rows at `base_1 + path_D` to the slots from `base_1` on.

        The indices are on the device, so that a CUDA graph can capture the move.
        """
        to = base_1 + torch.arange(len(path_D), device=path_D.device)
        for store in self:
            rows = store.flatten(0, 2)
            rows.index_copy_(1, to, rows.index_select(1, base_1 + path_D))


class KVCache:
    """Keys and values of one sequence, (L, 1, H, C, D): layers, KV heads, capacity in slots, head dimension.

    A slot is not a rotary position: with M-RoPE or a pruned prompt they differ. After the prompt both grow by one per
    token, so their difference is constant: `offset` = position - slot.

    Hugging Face's attention layers call `update` and `get_seq_length`; they need nothing else of the Cache class. A
    forward pass writes its rows from slot `length` on. Once `keep` has lowered `length`, the next pass overwrites the
    rows of rejected guesses.

    Args:
        layers: Number of layers.
        heads: KV heads of this rank.
        capacity: Number of slots.
        width: Head dimension.
        dtype: Dtype of keys and values.
        devices: One device for all layers, or one (layer count, device) pair per pipeline stage, in order.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        capacity: int,
        width: int,
        dtype: torch.dtype,
        devices: torch.device | Sequence[tuple[int, torch.device]],
    ) -> None:
        parts = ((layers, devices),) if isinstance(devices, torch.device) else tuple(devices)
        assert sum(count for count, _ in parts) == layers
        # Zeros, since an engine warms up over unwritten slots, which must not hold NaN.
        shapes = [((count, 1, heads, capacity, width), device) for count, device in parts]
        self.stores = tuple(Store(*(torch.zeros(s, dtype=dtype, device=d) for _ in "kv")) for s, d in shapes)
        self._layers = [(store.keys[row], store.values[row]) for store in self.stores for row in range(len(store.keys))]
        # Addresses of each stage. `_layers` holds their memory, whatever a strategy puts into `stores`.
        self.starts = tuple((store.keys.data_ptr(), store.values.data_ptr()) for store in self.stores)
        self.capacity = capacity
        self.length = self.offset = 0

    @property
    def keys(self) -> Tensor:
        """Keys (L, 1, H, C, D) of all layers. Only for a cache on one device."""
        (store,) = self.stores
        return store.keys

    @property
    def values(self) -> Tensor:
        """Values (L, 1, H, C, D) of all layers. Only for a cache on one device."""
        (store,) = self.stores
        return store.values

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, (1, H, C, D) each."""
        return self._layers[number]

    @property
    def whole(self) -> bool:
        """Whether no two slots share memory, and each layer's keys and values still are the rows of its store.

        False if a strategy has put other tensors there. Does not call methods set on a tensor.
        """
        tensors = [tensor for store in self.stores for tensor in store]
        if not all(type(x) is Tensor and Tensor.is_contiguous(x) and not Tensor.storage_offset(x) for x in tensors):
            return False
        rows = [(store.keys[row], store.values[row]) for store in self.stores for row in range(len(store.keys))]
        apart = len({(x.device, Tensor.data_ptr(x)) for x in tensors}) == len(tensors)
        return apart and list(map(_places, rows)) == list(map(_places, self._layers))

    @property
    def nbytes(self) -> int:
        """Size of the cache in bytes, on all devices together."""
        return sum(tensor.nbytes for store in self.stores for tensor in store)

    @property
    def position(self) -> int:
        """Rotary position of the next token."""
        return self.length + self.offset

    def fits(self, model: Shaped, capacity: int) -> bool:
        """Whether the cache has at least `capacity` slots, and the heads, dtype and devices that `model` needs."""
        first = self.stores[0].keys
        here = [(len(store.keys), store.keys.device) for store in self.stores]
        same = (first.shape[2], first.shape[4], first.dtype) == (model.kv_heads, model.head_dim, model.dtype)
        return same and self.capacity >= capacity and here == [(stage.layers, stage.device) for stage in model.stages]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write a layer's rows (1, H, Q, D) from slot `length` on; return its keys and values up to their end.

        `length` is raised later, by `advance`."""
        start, (keys, values) = self.length, self._layers[layer_idx]
        end = start + key.shape[2]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of slots in use, as Hugging Face's layers ask for it."""
        return self.length

    def advance(self, rows: int) -> None:
        """Count `rows` newly written rows as part of the sequence: add them to `length`."""
        self.length += rows

    def keep(self, base: int, path: Sequence[int]) -> None:
        """Move the rows at `base + path` (ascending) to the slots from `base` on, and drop all others from `base` on.

        Sets `length` to the slot after the last row kept.
        """
        end = base + len(path)
        if list(path) != list(range(len(path))):
            for store in self.stores:
                rows = torch.tensor(path, device=store.keys.device) + base
                for tensor in store:
                    tensor[:, :, :, base:end] = tensor.index_select(3, rows)
        self.length = end

    def move(self, base_1: Tensor, path_D: Tensor) -> None:
        """Move rows as `keep` does, with indices on the device for a CUDA graph; does not set `length`."""
        for store in self.stores:
            store.move(base_1.to(store.keys.device), path_D.to(store.keys.device))

    def copy(self, source: KVCache) -> None:
        """Fill this cache, which must be empty, with all rows of another cache of the same model."""
        self.follow(source, 0)
        self.offset = source.offset

    def gather(self, source: KVCache, slots_LHK: Tensor) -> None:
        """Fill this cache, which must be empty, with rows of another cache of the same model.

        The next position stays that of `source`.

        Args:
            source: The other cache.
            slots_LHK: Slots to copy, for each layer and KV head; ascending.
        """
        for number, slots_HK in enumerate(slots_LHK):
            for mine, theirs in zip(self.layer(number), source.layer(number), strict=True):
                rows_HKD = slots_HK.to(theirs.device)[..., None].expand(-1, -1, theirs.shape[-1])
                mine[0, :, : slots_HK.shape[1]] = theirs[0].gather(1, rows_HKD)
        self.length = slots_LHK.shape[2]
        self.offset = source.position - self.length

    def follow(self, source: KVCache, start: int) -> None:
        """Append rows of `source`, a cache of the same model, to this cache: those from slot `start` to its end."""
        end = self.length + source.length - start
        for mine, theirs in zip(self.stores, source.stores, strict=True):
            for to, of in zip(mine, theirs, strict=True):
                to[:, :, :, self.length : end] = of[:, :, :, start : source.length]
        self.length = end

    def clear(self) -> None:
        """Forget the sequence: set `length` and `offset` to 0. The tensors keep their content."""
        self.length = self.offset = 0


def _places(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Describe the address and memory layout of tensors."""
    return [(type(x), x.device, x.dtype, x.shape, Tensor.stride(x), Tensor.data_ptr(x)) for x in tensors]


class CachePool:
    """KV caches reused across requests. A request leases the caches it needs, which no other request uses meanwhile.

    Free caches are kept per role (the name of a cache within a request, such as "target") and reused last-in first-out,
    so that the graphs an engine captured for a cache serve the next request.

    Attributes:
        changes: Number of times that a cache was allocated or all were dropped. If it grows, graphs captured for caches
            that have been dropped are invalid.
    """

    def __init__(self) -> None:
        self._free: dict[str, list[KVCache]] = {}
        self._leased: list[tuple[str, KVCache]] = []
        self.changes = 0
        self._lock = Lock()

    def lease(self, drafter: bool = False) -> CacheLease:
        """Open a lease for one request; release it when the request ends.

        drafter: Whether the lease is for the drafter, which may not take the target's cache.
        """
        return CacheLease(self, ("target",) if drafter else ())

    def reserve(self, role: str, model: Shaped, capacity: int) -> None:
        """Make sure that a cache is free for a coming request of up to `capacity` slots."""
        self.give_back(role, self.take(role, model, capacity))

    def take(self, role: str, model: Shaped, capacity: int) -> KVCache:
        """Take a free cache out of the pool and clear it, or allocate one. Called by leases.

        If the role has free caches but none fits, one of them is dropped first.
        """
        with self._lock:
            free = self._free.setdefault(role, [])
            cache = next((cache for cache in reversed(free) if cache.fits(model, capacity)), None)
            if cache is not None:
                free.remove(cache)
            elif free:
                free.pop()  # too small or of another shape; free it before allocating the new one
        if cache is None:
            cache = model.new_cache(pooled(capacity))
            self.changes += 1
        cache.clear()
        with self._lock:
            self._leased.append((role, cache))
        return cache

    def give_back(self, role: str, cache: KVCache) -> None:
        """Return a cache to the pool, unless the pool was emptied meanwhile.

        If the pool would then keep more than ROLES roles, the free caches of the oldest role are dropped.
        """
        with self._lock:
            for number, (_, leased) in enumerate(self._leased):
                if leased is cache:
                    del self._leased[number]
                    if role not in self._free and len(self._free) >= ROLES:
                        self._free.pop(next(iter(self._free)))
                    self._free.setdefault(role, []).append(cache)
                    return

    def empty(self) -> None:
        """Drop all caches, leased ones too: they are not kept when given back."""
        with self._lock:
            self._free.clear()
            self._leased.clear()
            self.changes += 1

    @property
    def held(self) -> list[KVCache]:
        """All caches, free and leased."""
        with self._lock:
            return [*(cache for free in self._free.values() for cache in free), *(cache for _, cache in self._leased)]

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, free and leased."""
        return sum(cache.nbytes for cache in self.held)

    def bytes_on(self, device: torch.device, leased: bool = True) -> int:
        """Bytes of all caches on one device. leased: False leaves out those that requests hold."""
        held = [*self.held] if leased else [cache for free in [*self._free.values()] for cache in [*free]]
        return sum(t.nbytes for cache in held for store in cache.stores for t in store if t.device == device)


class CacheLease(AbstractContextManager["CacheLease"]):
    """Caches of one request, by role, given back to the pool by `release` or at the end of a `with` block.

    reserved: Roles that the lease may not take.
    """

    def __init__(self, pool: CachePool, reserved: tuple[str, ...] = ()) -> None:
        self._pool, self._reserved = pool, reserved
        self._taken: dict[str, KVCache] = {}

    def take(self, role: str, model: Shaped, capacity: int) -> KVCache:
        """Take an empty cache.

        Args:
            role: Name of the cache within the request, such as "draft".
            model: Model whose keys and values it will hold.
            capacity: Minimum number of slots.

        Raises:
            ValueError: The role is taken or reserved, or the lease has ROLES caches already.
        """
        if role in self._taken:
            raise ValueError(f"the request has a cache for {role!r} already: take one under another name")
        if role in self._reserved or len(self._taken) >= ROLES:
            reserved = f", none for {', '.join(self._reserved)}" if self._reserved else ""
            raise ValueError(f"no cache for {role!r}: a drafter may take {ROLES}{reserved}")
        cache = self._taken[role] = self._pool.take(role, model, capacity)
        return cache

    def has(self, cache: object) -> bool:
        """Whether the lease took this very cache."""
        return any(taken is cache for taken in self._taken.values())

    def hand_over(self, role: str, other: CacheLease) -> None:
        """Hand a cache over to another lease. Raises ValueError if that has one for the role."""
        if role in other._taken:
            raise ValueError(f"the request has a cache for {role!r} already")
        other._taken[role] = self._taken.pop(role)

    def release(self) -> None:
        """Give all caches back."""
        while self._taken:
            self._pool.give_back(*self._taken.popitem())

    def __exit__(self, *_: object) -> None:
        self.release()
