"""Requests that have been submitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prefill import SharedPrefill
from specvlm.decoding.room import cache_bytes
from specvlm.decoding.scheduler import Decoding
from specvlm.decoding.shared import SharedScheduler
from specvlm.decoding.watch import Watch
from specvlm.errors import OutOfMemory
from specvlm.models.kv_cache import CachePool
from specvlm.models.memory_plan import ran_out
from specvlm.session.room import check_request
from specvlm.strategies import Strategy
from specvlm.strategies.verifiers.coupled import own_rule
from specvlm.types import GenerationOptions, Step, VideoPrompt


class Requests:
    """Submits the requests of a session to its scheduler.

    Attributes:
        scheduler: Runs them.
        caches: KV caches that they lease.
    """

    def __init__(self, scheduler: SharedScheduler, caches: CachePool, watch: Watch) -> None:
        self.scheduler, self.caches, self._watch = scheduler, caches, watch

    def submit(self, work: Decoding, strategies: Sequence[Strategy] = (), size: int = 0) -> Call:
        """Submit a request. It waits until there is room.

        Args:
            work: The request.
            strategies: Those that take part in it.
            size: Bytes of its caches.
        """
        return Call(self, self._watch.over(work, strategies), size)

    def work(
        self,
        graph: DecodingGraph,
        prompt: VideoPrompt,
        options: GenerationOptions,
        shared: SharedPrefill | None = None,
        speculate: bool = True,
        started: Callable[[], object] = bool,
    ) -> Call:
        """Submit the request of a graph. It fails at its beginning if memory does not suffice.

        Args:
            graph: Its models and strategies.
            prompt: Its prompt.
            options: Its options.
            shared: Prefill to share with other requests.
            speculate: False decodes with the target alone.
            started: Called once there is room for the request.

        Raises:
            UserError: It can never have room.
        """

        def decoding() -> Decoding:
            started()
            check_request(graph, prompt, options)
            if speculate:
                yield from graph.work(prompt, options, shared)
            else:
                rule, rest = own_rule(graph.sampling), (graph.caches, graph.engine)
                yield from autoregressive_work(graph.target, prompt, options, rule, *rest)

        return self.submit(decoding(), (graph.pruner, graph.drafter, graph.verifier), cache_bytes(graph, prompt, options))


class Call:
    """A submitted request: an iterator of its steps. Any thread may cancel it.

    Attributes:
        cancelled: Whether it was cancelled before its end.
    """

    def __init__(self, requests: Requests, work: Decoding, size: int = 0) -> None:
        self._requests, self._ticket = requests, requests.scheduler.submit(work, size)
        self._ended = self.cancelled = False

    def __iter__(self) -> Iterator[Step]:
        """Raises OutOfMemory if memory runs out, or the error that ended the request."""
        try:
            while (step := self._requests.scheduler.step(self._ticket)) is not None:
                yield step
            self._ended = not self.cancelled
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            self._requests.caches.empty()  # those of running requests stay until these end
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            how = "ask for fewer frames, fewer new tokens, fewer answers, or less at a time"
            raise OutOfMemory(f"memory ran out while decoding: {how}") from error
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request, unless it has ended."""
        if not self._ended and not self.cancelled:
            self.cancelled = True
            self._requests.scheduler.cancel(self._ticket)


class Cancelled(Exception):
    """A call of a session was cancelled while its thread decoded."""


class Calls:
    """The requests of one call of a session, which any thread may cancel together, also before they are submitted."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._cancelled = False

    def add(self, submit: Callable[[], Call]) -> Call:
        """Submit a request, unless the call is cancelled. Raises Cancelled if it is."""
        self.check()
        call = submit()
        self._calls.append(call)
        if self._cancelled:  # since `check`
            call.cancel()
        return call

    def check(self) -> None:
        """Raise Cancelled if the call is cancelled."""
        if self._cancelled:
            raise Cancelled

    def steps(self, call: Call) -> list[Step]:
        """Wait for all steps of a request. Raises Cancelled if the call is cancelled meanwhile."""
        found = list(call)
        self.check()
        return found

    def cancel(self) -> None:
        """End the requests that have not ended."""
        self._cancelled = True
        for call in [*self._calls]:
            call.cancel()


@contextmanager
def begun(
    requests: Requests,
    graph: DecodingGraph,
    prompt: VideoPrompt,
    every: Sequence[GenerationOptions],
    calls: Calls | None = None,
    speculate: bool = True,
    started: Callable[[], object] = bool,
) -> Iterator[list[Call]]:
    """Submit requests with one prompt, which share its prefill; at the end of the block, cancel those still running.

    Args:
        requests: Submits them.
        graph: Their models and strategies.
        prompt: Their prompt.
        every: Options of each request.
        calls: Cancels them from another thread.
        speculate: False decodes with the target alone.
        started: Called once there is room for a request.
    """
    calls = calls or Calls()
    with SharedPrefill(graph.target, graph.caches, len(every)) as prefill:
        rest = (prefill if speculate and len(every) > 1 else None, speculate, started)
        try:
            yield [calls.add(partial(requests.work, graph, prompt, options, *rest)) for options in every]
        finally:
            calls.cancel()
