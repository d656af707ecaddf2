"""Per-stage timing of a request."""

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch


class Clock:
    """Measures seconds per stage since the last `lap`.

    On a GPU the clock records events in the stream, so that `mark` never waits for the device. The time of a stage is
    then that of its work on the device, plus the time that the device waited for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        """Return the time, or on a GPU an event that will hold it."""
        if self._stream is None:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def mark(self, part: str) -> None:
        """End the stage `part` here."""
        self.marks.append((part, self._now()))

    def wait(self, device: torch.device) -> None:
        """Include another GPU's work up to now: this clock's stream waits for that GPU; the host does not wait."""
        if self._stream is not None and device.type == "cuda" and device != self.device:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._stream.wait_event(event)

    def resume(self) -> None:
        """Restart the clock here, to leave out the time that the caller spent on the last step."""
        self.marks[-1] = ("", self._now())

    def lap(self) -> dict[str, float]:
        """Return the seconds of each stage since the last lap, and start a new lap. Waits for the device."""
        if self.device.type == "cuda":
            self.marks[-1][1].synchronize()
        parts: dict[str, float] = {}
        for (_, start), (part, end) in pairwise(self.marks):
            seconds = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            parts[part] = parts.get(part, 0.0) + seconds
        self.marks = self.marks[-1:]
        return parts
