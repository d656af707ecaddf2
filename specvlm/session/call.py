"""Requests that have been submitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefill import SharedPrefill
from specvlm.decoding.scheduler import Decoding
from specvlm.decoding.shared import SharedScheduler
from specvlm.types import GenerationOptions, Step, VideoPrompt


class Call:
    """A submitted request: an iterator of its steps. Any thread may cancel it.

    Attributes:
        cancelled: Whether it was cancelled before its end.
    """

    def __init__(self, scheduler: SharedScheduler, work: Decoding) -> None:
        self._scheduler, self._ticket = scheduler, scheduler.submit(work)
        self._ended = self.cancelled = False

    def __iter__(self) -> Iterator[Step]:
        try:
            while (step := self._scheduler.step(self._ticket)) is not None:
                yield step
            self._ended = not self.cancelled
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request, unless it has ended."""
        if not self._ended and not self.cancelled:
            self.cancelled = True
            self._scheduler.cancel(self._ticket)


@contextmanager
def begun(
    scheduler: SharedScheduler, graph: DecodingGraph, prompt: VideoPrompt, every: Sequence[GenerationOptions]
) -> Iterator[list[Call]]:
    """Submit requests with one prompt, which share its prefill; at the end of the block, cancel those still running.

    every: Options of each request.
    """
    calls: list[Call] = []
    with SharedPrefill(graph.target, graph.caches, len(every)) as prefill:
        shared = prefill if len(every) > 1 else None
        try:
            calls += [Call(scheduler, graph.work(prompt, options, shared)) for options in every]
            yield calls
        finally:
            for call in calls:
                call.cancel()
