"""Requests in turns: each runs until it wants a pass, and passes wanted at the same time are one call of the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from specvlm.engine import Engine
from specvlm.models.passes import Pass, Rows
from specvlm.types import Step

Decoding: TypeAlias = Generator[Pass | Step, Any, None]


NOTHING = nullcontext()


def inferring() -> AbstractContextManager[None]:
    """torch's inference mode, where nobody has entered it yet or a strategy has left it."""
    return NOTHING if torch.is_inference_mode_enabled() else torch.inference_mode()


@dataclass(eq=False)
class Ticket:
    """A request that was handed in. steps: those that nobody took yet. error: what it ended with, if anything."""

    work: Decoding
    steps: deque[Step] = field(default_factory=deque)
    error: BaseException | None = None
    done: bool = False
    wanted: Pass | None = None
    rows: Rows | None = None

    def advance(self, on: bool) -> None:
        """Run up to the next pass, the next step or the end; `on`: past one step. A request's error is its own."""
        try:
            item = self._next(self.rows)
            if isinstance(item, Step) and on:
                self._next(None)
        except StopIteration:
            self.done = True
        except BaseException as error:  # whoever reads this request must not take what it has for an answer
            self.done, self.error = True, error
            if not isinstance(error, Exception):
                raise

    def fail(self, error: Exception) -> None:
        """End it with an error: its caches are free again, although nobody may read it."""
        self.done, self.error = True, error
        self.work.close()

    def _next(self, rows: Rows | None) -> Pass | Step:
        with inferring():
            item = self.work.send(rows)
        self.rows = None
        if isinstance(item, Step):
            self.steps.append(item)
        else:
            self.wanted = item
        return item


class Scheduler:
    """Several requests over one engine. They may be of different models, drafters and rules.

    A request is a generator of passes and steps, as `DecodingGraph.work` and `autoregressive_work` make them. Whoever asks for
    its steps moves all requests on, so none is ahead of another by more than a round. Not for several threads at once: each
    has its own scheduler, over the same graph if it likes.

    Attributes:
        asked: Passes that requests asked for so far.
        run: Calls of the engine that gave them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.live: list[Ticket] = []
        self.asked = self.run = 0

    def submit(self, work: Decoding) -> Ticket:
        ticket = Ticket(work)
        self.live.append(ticket)
        return ticket

    def turn(self) -> None:
        """Move every request on by a pass."""
        together = len(self.live) > 1  # one by itself shows a step before it goes on
        for ticket in self.live:
            if ticket.wanted is None:  # else an interrupt came before its pass was run
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
        passes = [ticket.wanted for ticket in group if ticket.wanted is not None]
        try:
            with inferring():
                results: Sequence[Rows] = self.engine.run(passes)
            self.run += 1
            for ticket, rows in zip(group, results, strict=True):
                ticket.rows, ticket.wanted = rows, None
            return
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
                return
        for ticket in group:  # what one of them did is not the others' affair; what the failed pass took is free by now
            self._run([ticket])

    def steps(self, ticket: Ticket) -> Iterator[Step]:
        """A request's steps, as they come. Raises what the request raised."""
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
                    del error  # else its frames, and what lies in them on a GPU, wait for the garbage collector
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up: its caches are free again."""
        ticket.done = True
        self.live = [other for other in self.live if other is not ticket]
        ticket.work.close()


def alone(engine: Engine, work: Decoding) -> Iterator[Step]:
    """The steps of a request that has the engine to itself."""
    scheduler = Scheduler(engine)
    return scheduler.steps(scheduler.submit(work))
