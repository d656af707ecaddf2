"""Interleave requests: each runs until it needs a forward pass, and the engine runs the pending passes together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from specvlm.engine import Engine
from specvlm.models.passes import Job
from specvlm.types import Step

Decoding: TypeAlias = Generator[Job | Step, Any, None]


NOTHING = nullcontext()


def inferring() -> AbstractContextManager[None]:
    """Make a context manager that turns torch's inference mode on, unless it is; a strategy may have turned it off."""
    return NOTHING if torch.is_inference_mode_enabled() else torch.inference_mode()


@dataclass(eq=False)
class Ticket:
    """A submitted request.

    Attributes:
        work: The request's generator of passes and steps.
        steps: Steps not read yet.
        error: Exception that ended the request, if any.
        done: Whether the request has ended.
        wanted: Pass that the request waits for, if any.
        rows: Result of the request's last pass, until the request is resumed with it.
    """

    work: Decoding
    steps: deque[Step] = field(default_factory=deque)
    error: BaseException | None = None
    done: bool = False
    wanted: Job | None = None
    rows: Any = None

    def advance(self, on: bool) -> None:
        """Run the request up to its next pass, its next step or its end.

        Stores an exception of the request; one that is not an Exception, such as KeyboardInterrupt, is raised as well.

        on: After a step, run on to the next pass, step or end.
        """
        try:
            item = self._next(self.rows)
            if isinstance(item, Step) and on:
                self._next(None)
        except StopIteration:
            self.done = True
        except BaseException as error:  # the reader must not take the steps so far for a whole answer
            self.done, self.error = True, error
            if not isinstance(error, Exception):
                raise

    def fail(self, error: Exception) -> None:
        """End the request with an error and release its caches now, since its steps may never be read."""
        self.done, self.error = True, error
        with inferring():
            self.work.close()

    def _next(self, rows: Any) -> Job | Step:
        """Resume the generator with a pass's result and store what it yields."""
        with inferring():
            item = self.work.send(rows)
        self.rows = None
        if isinstance(item, Step):
            self.steps.append(item)
        else:
            self.wanted = item
        return item


class Scheduler:
    """Runs several requests on one engine. They may use different models, drafters and verifiers.

    A request is a generator of passes and steps, as `DecodingGraph.work` and `autoregressive_work` make them. Reading
    the steps of one request advances all of them by equally many passes. Not thread-safe: give each thread its own
    scheduler; several schedulers may share a graph.

    Attributes:
        asked: Number of passes requested so far.
        run: Number of engine calls that served them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.live: list[Ticket] = []
        self.asked = self.run = 0

    def submit(self, work: Decoding) -> Ticket:
        """Add a request.

        Args:
            work: From `DecodingGraph.work` or `autoregressive_work`.

        Returns:
            The request's ticket, to read its steps with `steps`.
        """
        ticket = Ticket(work)
        self.live.append(ticket)
        return ticket

    def turn(self) -> None:
        """Advance every request to its next pass, then run the pending passes; a lone request also stops at a step."""
        together = len(self.live) > 1  # a single request pauses at each step, so that it is read at once
        for ticket in self.live:
            if ticket.wanted is None:  # otherwise an interrupt came before its pass ran
                ticket.advance(together)
        self.live = [ticket for ticket in self.live if not ticket.done]
        groups: dict[int, list[Ticket]] = {}  # by model
        for ticket in self.live:
            if ticket.wanted is not None:
                groups.setdefault(id(ticket.wanted.model), []).append(ticket)
        for group in groups.values():
            self.asked += len(group)
            self._run(group)

    def _run(self, group: Sequence[Ticket]) -> None:
        """Run the pending passes of requests on one model in one call of the engine; one by one if that fails."""
        passes = [ticket.wanted for ticket in group if ticket.wanted is not None]
        try:
            with inferring():
                results = self.engine.run(passes)
            self.run += 1
            for ticket, rows in zip(group, results, strict=True):
                ticket.rows, ticket.wanted = rows, None
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
        with inferring():
            ticket.work.close()


def alone(engine: Engine, work: Decoding) -> Iterator[Step]:
    """Run a single request on an engine and yield its steps."""
    scheduler = Scheduler(engine)
    return scheduler.steps(scheduler.submit(work))
