"""A job that decodes several samples at the same time: `batch=8`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from specvlm.app.job import Job
from specvlm.app.prepare import KEPT, Prepared, Reading
from specvlm.app.readings import Read, Readings
from specvlm.app.request import RequestResult, begin, threads
from specvlm.app.samples import windows
from specvlm.config import RunConfig
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.room import cache_bytes
from specvlm.decoding.scheduler import Scheduler, Ticket, inferring
from specvlm.errors import StrategyError
from specvlm.models import memory_plan
from specvlm.strategies.fence import contained
from specvlm.types import Step


@dataclass(frozen=True)
class Decoded:
    """A sample that was decoded with others. peak_bytes: peak memory until the last of them ended."""

    reading: Reading
    ticket: Ticket
    peak_bytes: int


class BatchJob(Job):
    """Decodes up to `cfg.batch` samples at the same time, then compares, scores and writes each as a `Job` does.

    Baselines are decoded one after another, since their speed is that of one request. A sample that runs out of memory
    beside others is decoded again alone. If a strategy changes something that others use, all are decoded again alone,
    so that only the sample at fault fails.
    """

    def turn(
        self, index: int, readings: Readings, order: int | None = None, read_next: Callable[[], None] = lambda: None
    ) -> None:
        if index in self.todo and index not in self._tried:
            with threads(self.cfg.threads):
                self._decode_from(index, readings)
        super().turn(index, readings, order, read_next)
        self._decoded.pop(index, None)

    def start(self) -> None:
        super().start()
        self._decoded: dict[int, Decoded] = {}  # samples that are not written yet, by index
        self._tried = set[int]()

    def read(self, index: int) -> Read:
        known = self._decoded.get(index)
        return super().read(index) if known is None else lambda: known.reading

    def _decode_from(self, index: int, readings: Readings) -> None:
        """Decode a sample together with the next ones of this job, up to `cfg.batch` in all."""
        requests: dict[int, tuple[Reading, Prepared]] = {}
        order = [each for window in windows(self.samples, self.cfg.turn) for each in window if each in self.todo]
        chosen = order[order.index(index) :][: self.cfg.batch]
        self._tried.update(chosen)
        for each in chosen:
            try:
                with contained():
                    reading = readings.get(self.key(each), self.read(each))
                    requests[each] = reading, self.held.plan(self.setup, reading)
            except Exception:  # `_sample` gets the same error again, and notes it
                continue
        if len(requests) < 2:
            return
        prepared = {each: request for each, (_, request) in requests.items()}
        graph = self._graph(next(iter(prepared.values())), RequestResult())
        for device in self.setup.places.devices:
            memory_plan.reset_peak(device)
        try:
            with contained(), self.held.guard(graph):
                tickets = decoded_together(graph, prepared)
        except StrategyError:
            return
        peak = max(map(memory_plan.peak_bytes, self.setup.places.devices))
        self._decoded = {each: Decoded(requests[each][0], ticket, peak) for each, ticket in tickets.items()}

    def _decode(self, index: int, request: Prepared, graph: DecodingGraph, record: RequestResult) -> None:
        begin(request, graph, record)
        if self.cfg.baseline:
            record.baseline = self._baseline(request, graph, record)
        known = self._decoded.get(index)
        if known is not None and (known.ticket.error is None or not memory_plan.ran_out(known.ticket.error)):
            record.known = replayed(known.ticket)
        with self.held.guard(graph):
            self._stream(index, request, graph, record)

    def _answer(self, index: int, request: Prepared, graph: DecodingGraph, record: RequestResult) -> dict[str, Any]:
        found, known = super()._answer(index, request, graph, record), self._decoded.get(index)
        peak = known.peak_bytes if known else 0
        return found | {"peak_memory_bytes": max(peak, found["peak_memory_bytes"])}


def decoded_together(graph: DecodingGraph, requests: dict[int, Prepared]) -> dict[int, Ticket]:
    """Decode requests, at any time as many as fit into memory, and return their ended tickets by index."""
    sizes = {index: cache_bytes(graph, request.prompt) for index, request in requests.items()}
    first = next(iter(requests.values()))
    scheduler = Scheduler(graph.engine, room=max(room_beside(first, graph), *sizes.values()))
    tickets = {index: scheduler.submit(graph.work(requests[index].prompt), size) for index, size in sizes.items()}
    try:
        with inferring():
            while scheduler.live or scheduler.waiting:
                scheduler.turn()
    finally:
        for ticket in tickets.values():  # none is left, except after an interrupt
            scheduler.cancel(ticket)
    return tickets


def room_beside(request: Prepared, graph: DecodingGraph) -> int:
    """Return the bytes left for caches after the rest of a request's plan: activations, joined passes, kept prompts."""
    parts = [(device, request.plans[device].parts) for device in request.places.devices]
    other = sum(found.get(name, 0) for _, found in parts for name in ("activations (estimate)", memory_plan.JOINED, KEPT))
    return sum(memory_plan.free_bytes(device) for device, _ in parts) - other + graph.caches.nbytes


def replayed(ticket: Ticket) -> Iterator[Step]:
    """Yield the steps of a request that has ended, without times. Raises its error after the last."""
    yield from (replace(step, times_s={}) for step in ticket.steps)
    if ticket.error is not None:
        raise ticket.error


def job_class(cfg: RunConfig) -> type[Job]:
    """Return the class of a configuration's job."""
    return BatchJob if cfg.batch > 1 else Job
