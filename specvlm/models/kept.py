"""Tensors that are kept between requests: rows of KV caches, video features, signals.

Shape suffixes: L layers, H KV heads, C slots, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specvlm.models.checksum import checksum
from specvlm.models.kv_cache import KVCache


class Kept:
    """Tensors on their devices, or copies of them in host memory.

    A copy in host memory is used only if its checksum has not changed.

    Attributes:
        nbytes: Bytes of all tensors.
        on_host: Whether they are in host memory now.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self.on_host = tuple(tensors), False
        self._places = [(tensor.device, tensor.shape, tensor.dtype) for tensor in tensors]
        self._sum = 0
        self.nbytes = sum(tensor.nbytes for tensor in tensors)

    def offload(self) -> None:
        """Move the tensors to host memory, pinned if they come from a GPU."""
        self._sum = checksum(self._tensors)
        host = []
        for tensor in self._tensors:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host.append(copy.copy_(tensor, non_blocking=tensor.is_cuda))
        self._tensors, self.on_host = tuple(host), True

    def load(self) -> bool:
        """Move the tensors back to their devices. Returns False if a copy in host memory has changed."""
        if not self.on_host:
            return True
        if [(tensor.shape, tensor.dtype) for tensor in self._tensors] != [place[1:] for place in self._places]:
            return False
        moved = [
            tensor.to(device, non_blocking=True, copy=True)
            for tensor, (device, *_) in zip(self._tensors, self._places, strict=True)
        ]
        if checksum(moved) != self._sum:
            return False
        self._tensors, self.on_host = tuple(moved), False
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, on their devices. Do not write to them."""
        assert not self.on_host
        return self._tensors


def rows_of(cache: KVCache, start: int, end: int) -> list[Tensor]:
    """Copy keys and values of slots start..end-1 of a cache, (L, 1, H, C, D) each, one pair per pipeline stage."""
    return [tensor[:, :, :, start:end].clone() for store in cache.stores for tensor in store]


def write_rows(cache: KVCache, rows: Sequence[Tensor], at: int, start: int, end: int) -> None:
    """Write kept rows to slots start..end-1 of a cache. at: slot of the first kept row."""
    stores = (tensor for store in cache.stores for tensor in store)
    for to, kept in zip(stores, rows, strict=True):
        to[:, :, :, start:end] = kept[:, :, :, start - at : end - at]
