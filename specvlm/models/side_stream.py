"""A second stream of a device, for small work that the host reads while long work is queued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


class Mark:
    """A point in the work that is queued on a device's current stream.

    On a CPU, where nothing is queued, there is no such point: work before it is done, and yet `passed` is False.
    """

    def __init__(self, device: torch.device) -> None:
        self.event: Any = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.event = torch.cuda.Event()
                self.event.record()

    @property
    def passed(self) -> bool:
        """Whether the device has come this far."""
        return self.event is not None and bool(self.event.query())


@cache
def stream_of(device: torch.device) -> Any:
    """Return the second stream of a GPU: one for all requests, since torch keeps free memory apart for each stream."""
    return torch.cuda.Stream(device, priority=-1)


class SideStream:
    """A second stream of a device, whose work goes first. On a CPU it is no stream at all."""

    def __init__(self, device: torch.device) -> None:
        self.stream = stream_of(device) if device.type == "cuda" else None

    @contextmanager
    def after(self, mark: Mark | None) -> Iterator[None]:
        """Context manager that queues work on this stream, behind a mark, and waits for it at the end of the block.

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
