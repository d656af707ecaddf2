"""Admit a bounded number of requests; the others wait in order of arrival, or are asked to retry later."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from time import monotonic

from specvlm.serve.errors import DRAINING, ApiError, busy

LONGEST_WAIT = 60  # largest value of Retry-After, in seconds


class Admission:
    """Counts the running and waiting requests of one event loop, and the bytes of their bodies.

    Args:
        most: Most requests that run at once.
        queue: Most requests that wait.
        most_bytes: Most bytes of all bodies.

    Attributes:
        running: Requests that run.
        held_bytes: Bytes of the bodies of all requests.
        draining: Whether new requests are refused.
    """

    def __init__(self, most: int, queue: int, most_bytes: int) -> None:
        self._most, self._queue, self._most_bytes = most, queue, most_bytes
        self.running = self.held_bytes = 0
        self.draining = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_s = 1.0  # mean duration of recent requests, to estimate when there is room

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room."""
        return max(1, min(LONGEST_WAIT, math.ceil(self._mean_s * (1 + self.waiting / self._most))))

    def check(self) -> None:
        """Raise ApiError if requests are refused, or the queue is full."""
        if self.draining:
            raise ApiError(DRAINING, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})
        if self.running >= self._most and self.waiting >= self._queue:
            raise busy("the queue is full: try again later", self.retry_after)

    def hold(self, size: int) -> None:
        """Count bytes of a body. Raises ApiError if the bodies of all requests together are too large."""
        if self.held_bytes + size > self._most_bytes:
            raise busy("waiting requests take too many bytes: try again later", self.retry_after)
        self.held_bytes += size

    def release(self, size: int) -> None:
        """Stop counting bytes of a body."""
        self.held_bytes -= size

    async def enter(self, deadline: float) -> None:
        """Wait until there is room for a request, then count it as running.

        Args:
            deadline: Latest time to wait until, by `monotonic`.

        Raises:
            ApiError: The deadline has passed, the queue is full, or the server is shutting down.
        """
        self.check()
        if self.running < self._most and not self._waiting:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(max(0.0, deadline - monotonic())):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._next()  # it was admitted at the same moment
            else:
                self._waiting = deque(other for other in self._waiting if other is not turn)
            if isinstance(error, TimeoutError):
                raise busy("the request did not start in time: try again later", self.retry_after) from None
            raise

    def leave(self, seconds: float) -> None:
        """End a request that ran for `seconds`, and admit the next one."""
        self._mean_s += 0.1 * (seconds - self._mean_s)
        self._next()

    def refuse(self, error: ApiError) -> None:
        """Fail all waiting requests with an error."""
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(error)
        self._waiting.clear()

    def _next(self) -> None:
        """Pass a place on to the next waiting request, or free it."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
