"""Preallocated key/value storage. The only file that does cache surgery."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


T = TypeVar("T")


def pooled(slots: int) -> int:
    """Capacity of a pool's cache for a request of so many slots: in steps, so that the next, a little longer, still fits."""
    return -(-slots // 256) * 256


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
    def capacity(self) -> int:
        return self.stores[0].keys.shape[3]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for store in self.stores for tensor in store)

    @property
    def position(self) -> int:
        """Rotary position of the next token."""
        return self.length + self.offset

    def fits(self, model: VideoLM, capacity: int) -> bool:
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
    """Caches kept across requests: one per role, grown when a request needs more slots.

    A role's cache belongs to the request that asked last: an older, half-read one finds its `lease` outdated. changes: how
    often a cache was made or given up so far, with which goes what an engine captured for the one before.
    """

    def __init__(self) -> None:
        self._caches: dict[str, KVCache] = {}
        self._leases: dict[str, int] = {}
        self.changes = 0
        self._lock = Lock()

    def one_at_a_time(self, steps: Iterator[T]) -> Iterator[T]:
        """The steps of a request. Raises RuntimeError, at once, where another thread is in the middle of one with this pool."""
        try:
            while True:
                if not self._lock.acquire(blocking=False):
                    raise RuntimeError("another thread is decoding with these caches: one request at a time")
                try:
                    step = next(steps, None)
                finally:
                    self._lock.release()
                if step is None:
                    return
                yield step
        finally:
            if isinstance(steps, Generator):
                steps.close()

    def take(self, role: str, model: VideoLM, capacity: int) -> KVCache:
        cache = self._caches.get(role)
        if cache is None or not cache.fits(model, capacity):
            self._caches.pop(role, None)  # free the old one before the new one is there
            cache = self._caches[role] = model.new_cache(pooled(capacity))
            self.changes += 1
        cache.clear()
        self._leases[role] = self._leases.get(role, 0) + 1
        return cache

    def empty(self) -> None:
        self._caches.clear()
        self.changes += 1

    def lease(self, role: str) -> int:
        return self._leases.get(role, 0)

    @property
    def held(self) -> list[KVCache]:
        return list(self._caches.values())

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values())

    def bytes_on(self, device: torch.device) -> int:
        tensors = [t for cache in self._caches.values() for store in cache.stores for t in store]
        return sum(tensor.nbytes for tensor in tensors if tensor.device == device)
