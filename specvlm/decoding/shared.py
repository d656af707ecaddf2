"""A scheduler that several threads share, so that their requests run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, get_ident
from typing import TypeVar

import torch

from specvlm.decoding.scheduler import Decoding, Scheduler, Ticket, inferring
from specvlm.decoding.slices import STALL_S
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.types import Step

T = TypeVar("T")


class SharedScheduler:
    """Runs the requests of several threads on one engine.

    It has no thread of its own: one of the threads that wait for a step runs a turn for all requests, then the next one
    does. So requests make no progress while no thread waits for a step, and nothing needs to be shut down.

    Args:
        engine: Engine that runs the passes.
        device: Device of the models. If it is a GPU, each thread makes it its current one.
        room: As in `Scheduler`.
        most: As in `Scheduler`.
        stall_s: As in `Scheduler`.
    """

    def __init__(
        self,
        engine: Engine,
        device: torch.device,
        room: int | None = None,
        most: int | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        self._scheduler, self._device = Scheduler(engine, room, most, stall_s), device
        self._changed = Condition()  # guards everything below, and signals the end of a turn
        self._runner: int | None = None  # the thread that runs a turn
        self._new: list[Ticket] = []
        self._gone: list[Ticket] = []

    @property
    def asked(self) -> int:
        """Number of passes requested so far."""
        return self._scheduler.asked

    @property
    def run(self) -> int:
        """Number of engine calls that served them."""
        return self._scheduler.run

    def submit(self, work: Decoding, size: int = 0) -> Ticket:
        """Add a request, as `Scheduler.submit` does. Raises UserError if it can never fit."""
        ticket = self._scheduler.ticket(work, size)
        with self._changed:
            self._new.append(ticket)
        return ticket

    def step(self, ticket: Ticket) -> Step | None:
        """Wait for a request's next step and return it; None after its last one. Runs turns if no other thread does.

        Raises the error that ended the request; UserError if called by a request of this scheduler.
        """
        with self._changed:
            while not ticket.steps and not ticket.done:
                if self._runner is None:
                    self._turn()
                else:
                    self._wait()
            if ticket.steps:
                return ticket.steps.popleft()
            error, ticket.error = ticket.error, None
        if error is None:
            return None
        try:
            raise error
        finally:
            del error  # break the reference cycle, which would keep the frames' GPU tensors alive

    def cancel(self, ticket: Ticket) -> None:
        """End a request and release its caches: now, or at the end of the turn that is running."""
        with self._changed:
            self._gone.append(ticket)
            if self._runner is None:
                self._settle()

    def between(self, work: Callable[[], T]) -> T:
        """Wait until no turn runs, then call a function and return its result. No turn starts before it returns.

        For work that uses the models or the engine outside of a request.

        Raises UserError if called by a request of this scheduler.
        """
        with self._changed:
            while self._runner is not None:
                self._wait()
            with self._runs():
                return work()

    def _wait(self) -> None:
        """Wait for the end of the turn that another thread runs. Called with the lock."""
        if self._runner == get_ident():
            how = "call it outside of logits processors, stopping criteria and strategies"
            raise UserError(f"a request cannot wait for another one of the same session: {how}")
        self._changed.wait()

    def _turn(self) -> None:
        """Run a turn, then wake the other threads. Called with the lock."""
        self._settle()
        with self._runs():
            self._scheduler.turn()

    @contextmanager
    def _runs(self) -> Iterator[None]:
        """Context manager in which only this thread uses the engine. Enter with the lock; it is released meanwhile."""
        self._runner = get_ident()
        self._changed.release()
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with inferring():
                yield
        finally:
            self._changed.acquire()
            self._runner = None
            self._settle()
            self._changed.notify_all()

    def _settle(self) -> None:
        """Admit new requests and drop cancelled ones. Called with the lock, while no turn runs."""
        gone, self._gone = self._gone, []
        self._scheduler.waiting += self._new
        self._new = []
        for ticket in gone:
            self._scheduler.cancel(ticket)
