"""Interleave requests: each runs until it needs a forward pass, and the engine runs the pending passes together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from specvlm.decoding.slices import STALL_S, Slices
from specvlm.decoding.ticket import Decoding, Ticket, inferring
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.types import Step

__all__ = ["PATIENCE", "Decoding", "Scheduler", "Ticket", "alone", "inferring"]

PATIENCE = 8  # most turns that a pass of the largest model waits for passes of smaller ones


class Scheduler:
    """Runs several requests on one engine. They may use different models, drafters and verifiers.

    A request is a generator of passes and steps, as `DecodingGraph.work` and `autoregressive_work` make them. Reading
    the steps of one request advances all of them. Requests start in the order in which they were submitted, as soon as
    there is room. None overtakes another, so a request waits at most until those before it have ended.

    A request that fails, is cancelled or runs out of memory does not affect others. Not thread-safe: give each thread
    its own scheduler, or use a `SharedScheduler`. Several schedulers may share a graph.

    Args:
        engine: Engine that runs the passes.
        room: Bytes of KV caches that requests may lease at the same time. None: any number. Free caches that a pool
            keeps for later requests do not count.
        most: Maximum number of requests that run at the same time. None: any number. With tensor parallelism give 1:
            ranks that take different turns would wait for each other forever.
        stall_s: Seconds that prefills of others may delay a step of a request that decodes.

    Attributes:
        live: Requests that run.
        waiting: Requests that wait for room, in the order in which they came.
        asked: Number of passes requested so far.
        run: Number of engine calls that served them.
    """

    def __init__(self, engine: Engine, room: int | None = None, most: int | None = None, stall_s: float = STALL_S) -> None:
        if most is not None and most < 1:
            raise UserError(f"most={most}: at least 1 request must be able to run")
        self.engine, self.room, self.most, self.slices = engine, room, most, Slices(stall_s)
        self.live: list[Ticket] = []
        self.waiting: deque[Ticket] = deque()
        self.asked = self.run = 0

    def submit(self, work: Decoding, size: int = 0) -> Ticket:
        """Add a request. It starts with a later turn.

        Args:
            work: From `DecodingGraph.work` or `autoregressive_work`.
            size: Bytes of KV caches that it leases (`room.cache_bytes`). Needed only with `room`.

        Returns:
            The request's ticket, to read its steps with `steps`.

        Raises:
            UserError: The request can never fit.
        """
        ticket = self.ticket(work, size)
        self.waiting.append(ticket)
        return ticket

    def ticket(self, work: Decoding, size: int = 0) -> Ticket:
        """Make a ticket without adding it. Raises UserError if the request can never fit."""
        if self.room is not None and size > self.room:
            raise UserError(
                f"a request needs {size / 2**20:,.1f} MiB of KV cache, and all of them may use {self.room / 2**20:,.1f} MiB:"
                " lower max_new_tokens, frames or max_pixels, or allow more"
            )
        return Ticket(work, size)

    def turn(self) -> None:
        """Advance every request to its next pass, then run the pending passes; a lone request also stops at a step.

        Prefills get a slice of the turn, see `Slices`.
        """
        self._admit()
        together = len(self.live) > 1  # a single request pauses at each step, so that it is read immediately
        for ticket in self.live:
            if ticket.wanted is None and ticket.resting is None:  # otherwise its pass was held back, or has not run
                ticket.advance(together)
        self.slices.run(self.live, together)
        self.live = [ticket for ticket in self.live if not ticket.done]
        for group in self._groups():
            self.asked += len(group)
            self._run(group)

    def _admit(self) -> None:
        """Start waiting requests, first come first served, while there is room."""
        used = sum(ticket.size for ticket in self.live)
        while self.waiting and (self.most is None or len(self.live) < self.most):
            used += self.waiting[0].size
            if self.room is not None and used > self.room:
                return
            self.live.append(self.waiting.popleft())

    def _groups(self) -> list[list[Ticket]]:
        """Group requests by the model of their pending pass, and choose the groups to run in this turn.

        Passes of the largest model wait for those of smaller ones, at most PATIENCE turns. So requests that are out of
        step, since they came later or draft less deeply, still have their trees checked in one pass.
        """
        groups: dict[int, list[Ticket]] = {}
        for ticket in self.live:
            if ticket.wanted is not None:
                groups.setdefault(id(ticket.wanted.model), []).append(ticket)
        ordered = sorted(groups.values(), key=_model_size)
        if len(ordered) > 1 and all(ticket.held < PATIENCE for ticket in ordered[-1]):
            for ticket in ordered.pop():
                ticket.held += 1
        return ordered

    def _run(self, group: Sequence[Ticket]) -> None:
        """Run the pending passes of requests on one model in one call of the engine; one by one if that fails."""
        passes = [ticket.wanted for ticket in group if ticket.wanted is not None]
        try:
            with inferring():
                results = self.engine.run(passes)
            self.run += 1
            for ticket, rows in zip(group, results, strict=True):
                ticket.rows, ticket.wanted, ticket.held = rows, None, 0
            return
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
                return
        # Run them one by one, so that only the request at fault fails. The failed pass has freed its memory by now.
        for ticket in group:
            self._run([ticket])

    def steps(self, ticket: Ticket) -> Iterator[Step]:
        """Yield a request's steps as they happen, advancing all requests. Cancels the request if the reader stops.

        Raises the error that ended the request.
        """
        try:
            while True:
                while ticket.steps:
                    yield ticket.steps.popleft()
                if ticket.done:
                    break
                with inferring():
                    while not (ticket.steps or ticket.done):
                        self.turn()
            error, ticket.error = ticket.error, None
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # break the reference cycle, which would keep the frames' GPU tensors alive
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request and release its caches."""
        ticket.done = True
        self.live = [other for other in self.live if other is not ticket]
        self.waiting = deque(other for other in self.waiting if other is not ticket)
        with inferring():
            ticket.work.close()


def _model_size(group: Sequence[Ticket]) -> int:
    """A number that grows with the size of the model that the requests wait for."""
    assert group[0].wanted is not None
    model = group[0].wanted.model
    return int(model.layers) * int(model.text.config.hidden_size) ** 2


def alone(engine: Engine, work: Decoding) -> Iterator[Step]:
    """Run a single request on an engine and yield its steps."""
    scheduler = Scheduler(engine)
    return scheduler.steps(scheduler.submit(work))
