"""What a request's time goes to."""

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch


class Clock:
    """Seconds by part since the last `lap`. On a GPU by events in its stream, so that no mark waits for the device: a part
    pays for its own work, and for what the device waited for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def mark(self, part: str) -> None:
        self.marks.append((part, self._now()))

    def wait(self, device: torch.device) -> None:
        """Work on another GPU counts up to now as this one's: its stream waits for it, the host does not."""
        if device.type == self.device.type == "cuda" and device != self.device:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            torch.cuda.current_stream(self.device).wait_event(event)

    def resume(self) -> None:
        """What the consumer did since the last step is not ours."""
        self.marks[-1] = ("", self._now())

    def lap(self) -> dict[str, float]:
        if self.device.type == "cuda":
            self.marks[-1][1].synchronize()
        parts: dict[str, float] = {}
        for (_, start), (part, end) in pairwise(self.marks):
            seconds = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            parts[part] = parts.get(part, 0.0) + seconds
        self.marks = self.marks[-1:]
        return parts
