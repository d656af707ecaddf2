"""Asynchronous copy of a tensor to the host, which waits for the device only when it reads the values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copy of a tensor of integers, made on the device's current stream. The host waits for the device only in `read`.

    Args:
        tensor: Tensor to copy. A tensor on the host is read immediately.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values: list[int] | None = None
        if tensor.device.type != "cuda":
            self._values = tensor.tolist()
            return
        self._pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.device(tensor.device):
            self._pinned.copy_(tensor, non_blocking=True)
            self._copied: Any = torch.cuda.Event()
            self._copied.record()

    @property
    def done(self) -> bool:
        """Whether the copy has arrived, so that `read` does not wait."""
        return self._values is not None or self._copied.query()

    def read(self) -> list[int]:
        """Return the values. Waits for the device."""
        if self._values is None:
            self._copied.synchronize()
            self._values = self._pinned.tolist()
        return self._values
