"""Preallocated key/value storage. The only file that does cache surgery."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


def pooled(slots: int) -> int:
    """Capacity of a pool's cache for a request of so many slots: in steps, so that the next, a little longer, still fits."""
    return -(-slots // 256) * 256


ROLES = 8  # of caches that are kept, and that one request may have


class Shaped(Protocol):
    """What a cache must know of the model that it is for."""

    kv_heads: int
    head_dim: int

    @property
    def stages(self) -> Sequence[Any]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def new_cache(self, capacity: int) -> KVCache: ...


class Store(NamedTuple):
    """Keys and values of neighbouring layers, on the device where those layers are, (L, 1, H, C, D) each."""

    keys: Tensor
    values: Tensor

    def move(self, base_1: Tensor, path_D: Tensor) -> None:
        """As `KVCache.keep`, with nothing the host must know: `length` is left to the caller."""
        to = base_1 + torch.arange(len(path_D), device=path_D.device)
        for store in self:
            rows = store.flatten(0, 2)
            rows.index_copy_(1, to, rows.index_select(1, base_1 + path_D))


class KVCache:
    """Keys and values of one sequence, (L, 1, H, C, D): layers, KV heads, capacity in slots, head width.

    Slots and rotary positions are separate: with M-RoPE, and with a pruned prompt, they differ. Behind the prompt
    both grow by one a token, so one number, `offset` = position - slot, carries one to the other.

    Hugging Face attention layers call `update` and `get_seq_length`; nothing else of their Cache class is used.
    A forward pass writes its rows behind `length`; rows of rejected guesses are overwritten after `keep`.

    devices: one for all layers, or for each neighbourhood of layers its length and its device, in order.
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
        # Zeros, since an engine warms up over slots that nobody wrote: they give it numbers.
        shapes = [((count, 1, heads, capacity, width), device) for count, device in parts]
        self.stores = tuple(Store(*(torch.zeros(s, dtype=dtype, device=d) for _ in "kv")) for s, d in shapes)
        self._at = [(store, row) for store in self.stores for row in range(len(store.keys))]
        self.capacity = capacity
        self.length = 0
        self.offset = 0

    @property
    def keys(self) -> Tensor:
        """Of a cache that lies on one device."""
        (store,) = self.stores
        return store.keys

    @property
    def values(self) -> Tensor:
        (store,) = self.stores
        return store.values

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (1, H, C, D) each."""
        store, row = self._at[number]
        return store.keys[row], store.values[row]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for store in self.stores for tensor in store)

    @property
    def position(self) -> int:
        """Rotary position of the next token."""
        return self.length + self.offset

    def fits(self, model: Shaped, capacity: int) -> bool:
        """Would `model` find `capacity` slots of its own shape here?"""
        first = self.stores[0].keys
        here = [(len(store.keys), store.keys.device) for store in self.stores]
        same = (first.shape[2], first.shape[4], first.dtype) == (model.kv_heads, model.head_dim, model.dtype)
        return same and self.capacity >= capacity and here == [(stage.layers, stage.device) for stage in model.stages]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write rows (1, H, Q, D) behind `length` and return all that a row may attend to. `advance` makes them count."""
        end = self.length + key.shape[2]
        keys, values = self.layer(layer_idx)
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def advance(self, rows: int) -> None:
        self.length += rows

    def keep(self, base: int, path: Sequence[int]) -> None:
        """Of the rows from slot `base` on, keep those at `base + path` (ascending), moved together in place."""
        end = base + len(path)
        if list(path) != list(range(len(path))):
            for store in self.stores:
                rows = torch.tensor(path, device=store.keys.device) + base
                for tensor in store:
                    tensor[:, :, :, base:end] = tensor.index_select(3, rows)
        self.length = end

    def move(self, base_1: Tensor, path_D: Tensor) -> None:
        """As `keep`, with nothing the host must know: `length` is left to the caller."""
        for store in self.stores:
            store.move(base_1.to(store.keys.device), path_D.to(store.keys.device))

    def gather(self, source: KVCache, slots_LHK: Tensor) -> None:
        """Fill an empty cache with rows of another of the same model, for every layer and KV head its own; ascending slots."""
        for number, slots_HK in enumerate(slots_LHK):
            for mine, theirs in zip(self.layer(number), source.layer(number), strict=True):
                rows_HKD = slots_HK.to(theirs.device)[..., None].expand(-1, -1, theirs.shape[-1])
                mine[0, :, : slots_HK.shape[1]] = theirs[0].gather(1, rows_HKD)
        self.length = slots_LHK.shape[2]
        self.offset = source.position - self.length

    def follow(self, source: KVCache, start: int) -> None:
        """Append the rows of another cache of the same model from slot `start` to its end."""
        end = self.length + source.length - start
        for mine, theirs in zip(self.stores, source.stores, strict=True):
            for to, of in zip(mine, theirs, strict=True):
                to[:, :, :, self.length : end] = of[:, :, :, start : source.length]
        self.length = end

    def clear(self) -> None:
        self.length = self.offset = 0


class CachePool:
    """Caches kept across requests. A request leases those it needs, and no other has them until it ends.

    Free ones are kept by role and handed out again, the last one given back first: what an engine captured for a cache serves
    the next request that gets it. changes: how often one was made so far, or all
    were given up: with a cache goes what an engine captured for it.
    """

    def __init__(self) -> None:
        self._free: dict[str, list[KVCache]] = {}
        self._leased: list[tuple[str, KVCache]] = []
        self.changes = 0
        self._lock = Lock()

    def lease(self, drafter: bool = False) -> CacheLease:
        """For one request; release it when the request ends. drafter: for its drafter, which never has the target's."""
        return CacheLease(self, ("target",) if drafter else ())

    def reserve(self, role: str, model: Shaped, capacity: int) -> None:
        """Make room for a request to come, so that a longer one behind it finds the same cache."""
        self.give_back(role, self.take(role, model, capacity))

    def take(self, role: str, model: Shaped, capacity: int) -> KVCache:
        """An empty cache that nobody else has until it is given back. Called by leases."""
        with self._lock:
            free = self._free.setdefault(role, [])
            cache = next((cache for cache in reversed(free) if cache.fits(model, capacity)), None)
            if cache is not None:
                free.remove(cache)
            elif free:
                free.pop()  # of another shape, or too small: before the new one is there
        if cache is None:
            cache = model.new_cache(pooled(capacity))
            self.changes += 1
        cache.clear()
        with self._lock:
            self._leased.append((role, cache))
        return cache

    def give_back(self, role: str, cache: KVCache) -> None:
        with self._lock:
            for number, (_, leased) in enumerate(self._leased):
                if leased is cache:
                    del self._leased[number]
                    if role not in self._free and len(self._free) >= ROLES:
                        self._free.pop(next(iter(self._free)))
                    self._free.setdefault(role, []).append(cache)
                    return

    def empty(self) -> None:
        """Forget all; what is leased is not kept when it comes back."""
        with self._lock:
            self._free.clear()
            self._leased.clear()
            self.changes += 1

    @property
    def held(self) -> list[KVCache]:
        with self._lock:
            return [*(cache for free in self._free.values() for cache in free), *(cache for _, cache in self._leased)]

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.held)

    def bytes_on(self, device: torch.device) -> int:
        tensors = [t for cache in self.held for store in cache.stores for t in store]
        return sum(tensor.nbytes for tensor in tensors if tensor.device == device)


class CacheLease(AbstractContextManager["CacheLease"]):
    """Caches of one request, by role; given back to their pool when it ends. reserved: roles that it may not take."""

    def __init__(self, pool: CachePool, reserved: tuple[str, ...] = ()) -> None:
        self._pool, self._reserved = pool, reserved
        self._taken: dict[str, KVCache] = {}

    def take(self, role: str, model: Shaped, capacity: int) -> KVCache:
        """An empty cache of at least `capacity` slots. Raises ValueError for a role that the request has one of already."""
        if role in self._taken:
            raise ValueError(f"there is a cache for {role!r} already: take one under another name")
        if role in self._reserved or len(self._taken) >= ROLES:
            raise ValueError(f"no cache for {role!r}: a drafter takes at most {ROLES}, none for {', '.join(self._reserved)}")
        cache = self._taken[role] = self._pool.take(role, model, capacity)
        return cache

    def has(self, cache: object) -> bool:
        return any(taken is cache for taken in self._taken.values())

    def release(self) -> None:
        while self._taken:
            self._pool.give_back(*self._taken.popitem())

    def __exit__(self, *_: object) -> None:
        self.release()
