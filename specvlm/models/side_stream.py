"""A second stream of a device, for small work that the host reads while long work is queued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


class Mark:
    """A point in the work that is queued on a device's current stream.

    On a CPU nothing is queued, so a mark means nothing there, and `passed` is always False.
    """

    def __init__(self, device: torch.device) -> None:
        self.event: Any = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.event = torch.cuda.Event()
                self.event.record()

    @property
    def passed(self) -> bool:
        """Whether the device has done all work queued before the mark. Always False on a CPU."""
        return self.event is not None and bool(self.event.query())


@cache
def stream_of(device: torch.device) -> Any:
    """Return the second stream of a GPU. All requests share it, since torch keeps a pool of free memory per stream."""
    return torch.cuda.Stream(device, priority=-1)


class SideStream:
    """A second stream of a GPU, whose work goes before that of the main stream. On a CPU, work simply runs."""

    def __init__(self, device: torch.device) -> None:
        self.stream = stream_of(device) if device.type == "cuda" else None

    @contextmanager
    def after(self, mark: Mark | None) -> Iterator[None]:
        """Context manager that queues a block's work on this stream, after a mark, and waits for it at the end.

        Tensors of the block may then be used on any stream.
        """
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            if mark is not None:
                self.stream.wait_event(mark.event)
            yield
        self.stream.synchronize()
