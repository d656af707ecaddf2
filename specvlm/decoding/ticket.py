"""A submitted request."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any, TypeAlias

import torch

from specvlm.models.passes import Job
from specvlm.models.pauses import Pause
from specvlm.types import Step

Decoding: TypeAlias = Generator[Job | Pause | Step, Any, None]

NOTHING = nullcontext()


def inferring() -> AbstractContextManager[None]:
    """Make a context manager that turns torch's inference mode on if it is off: a strategy may have turned it off."""
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
        size: Bytes of KV caches that the request leases.
        resting: Pause at which the request's prefill is interrupted, if it is.
        stalled: Seconds that prefills of others have taken since the request's last step.
        decodes: Whether the request has yielded a step.
        held: Number of turns that the pass in `wanted` has waited for those of smaller models.
    """

    work: Decoding
    size: int = 0
    steps: deque[Step] = field(default_factory=deque)
    error: BaseException | None = None
    done: bool = False
    wanted: Job | None = None
    rows: Any = None
    held: int = 0
    resting: Pause | None = None
    stalled: float = 0.0
    decodes: bool = False

    def advance(self, on: bool) -> None:
        """Run the request up to its next pass, its next pause, its next step or its end.

        Stores an exception of the request; one that is not an Exception, such as KeyboardInterrupt, is raised as well.

        on: After a step, continue to the next pass, step or end.
        """
        try:
            item = self._next(self.rows)
            if isinstance(item, Step) and on:
                self._next(None)
        except StopIteration:
            self.done = True
        except BaseException as error:  # the reader must not mistake the steps so far for a whole answer
            self._ended_by(error)
            if not isinstance(error, Exception):
                raise

    def fail(self, error: Exception) -> None:
        """End the request with an error and release its caches now, since its steps may never be read."""
        self._ended_by(error)
        with inferring():
            self.work.close()

    def _ended_by(self, error: BaseException) -> None:
        """Store the error that ended the request, without the tensors in the frames of its traceback."""
        self.done, self.error = True, error
        clear_frames(error.__traceback__)

    def _next(self, rows: Any) -> Job | Pause | Step:
        """Resume the generator with a pass's result and store what it yields."""
        with inferring():
            item = self.work.send(rows)
        self.rows, self.resting = None, None
        if isinstance(item, Step):
            self.steps.append(item)
            self.stalled, self.decodes = 0.0, True
        elif isinstance(item, Pause):
            self.resting = item
        else:
            self.wanted = item
        return item
