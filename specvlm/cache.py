"""Preallocated key/value storage. The only file that does cache surgery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


def pooled(slots: int) -> int:
    """Capacity of a pool's cache for a request of so many slots: in steps, so that the next, a little longer, still fits."""
    return -(-slots // 256) * 256


class KVCache:
    """Keys and values of one sequence, (L, 1, H, C, D): layers, KV heads, capacity in slots, head width.

    Slots and rotary positions are separate: with M-RoPE, and with a pruned prompt, they differ. Behind the prompt
    both grow by one a token, so one number, `offset` = position - slot, carries one to the other.

    Hugging Face attention layers call `update` and `get_seq_length`; nothing else of their Cache class is used.
    A forward pass writes its rows behind `length`; rows of rejected guesses are overwritten after `keep`.
    """

    def __init__(self, layers: int, heads: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, since an engine warms up over slots that nobody wrote: they give it numbers.
        self.keys = torch.zeros(layers, 1, heads, capacity, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0
        self.offset = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def position(self) -> int:
        """Rotary position of the next token."""
        return self.length + self.offset

    def fits(self, model: VideoLM, capacity: int) -> bool:
        """Would `model` find `capacity` slots of its own shape here?"""
        layers, _, heads, _, width = self.keys.shape
        same = (layers, heads, width) == (model.layers, model.kv_heads, model.head_dim)
        return same and self.capacity >= capacity and (self.keys.dtype, self.keys.device) == (model.dtype, model.device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write rows (1, H, Q, D) behind `length` and return all that a row may attend to. `advance` makes them count."""
        end = self.length + key.shape[2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
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
            rows = torch.tensor(path, device=self.keys.device) + base
            self.keys[:, :, :, base:end] = self.keys.index_select(3, rows)
            self.values[:, :, :, base:end] = self.values.index_select(3, rows)
        self.length = end

    def move(self, base_1: Tensor, path_D: Tensor) -> None:
        """As `keep`, on the device alone: rows `base + path` to `base`, `base + 1` …; `length` is left to the caller."""
        to = base_1 + torch.arange(len(path_D), device=path_D.device)
        for store in (self.keys, self.values):
            rows = store.flatten(0, 2)
            rows.index_copy_(1, to, rows.index_select(1, base_1 + path_D))

    def clear(self) -> None:
        self.length = self.offset = 0


class CachePool:
    """Caches kept across requests: one per role, grown when a request needs more slots.

    A role's cache belongs to the request that asked last: an older, half-read one finds its `lease` outdated.
    """

    def __init__(self) -> None:
        self._caches: dict[str, KVCache] = {}
        self._leases: dict[str, int] = {}

    def take(self, role: str, model: VideoLM, capacity: int) -> KVCache:
        cache = self._caches.get(role)
        if cache is None or not cache.fits(model, capacity):
            self._caches.pop(role, None)  # free the old one before the new one is there
            cache = self._caches[role] = model.new_cache(pooled(capacity))
        cache.clear()
        self._leases[role] = self._leases.get(role, 0) + 1
        return cache

    def lease(self, role: str) -> int:
        return self._leases.get(role, 0)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values())
