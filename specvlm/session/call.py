"""Requests that have been submitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.room import cache_bytes
from specvlm.decoding.scheduler import Decoding
from specvlm.decoding.shared import SharedScheduler
from specvlm.decoding.watch import Watch
from specvlm.errors import OutOfMemory
from specvlm.models.kv_cache import CachePool
from specvlm.models.memory_plan import kv_bytes, ran_out
from specvlm.session.room import check_request
from specvlm.strategies import Strategy
from specvlm.strategies.verifiers.coupled import own_rule
from specvlm.types import GenerationOptions, Step, VideoPrompt


class Requests:
    """Submits the requests of a session to its scheduler.

    Attributes:
        scheduler: Runs the requests.
        caches: KV caches that requests lease.
        prefixes: KV cache rows of earlier prompts, to reuse; None if nothing is kept.
    """

    def __init__(
        self, scheduler: SharedScheduler, caches: CachePool, watch: Watch, prefixes: PrefixStore | None = None
    ) -> None:
        self.scheduler, self.caches, self._watch, self.prefixes = scheduler, caches, watch, prefixes

    def submit(self, work: Decoding, strategies: Sequence[Strategy] = (), size: int = 0) -> Call:
        """Submit a request. It starts once there is memory for its caches; this method does not wait for that.

        Args:
            work: Generator that decodes the request.
            strategies: Strategies that take part in the request.
            size: Bytes of the request's KV caches.

        Raises:
            UserError: There can never be room for the request.
        """
        return Call(self, self._watch.over(work, strategies), size)

    def work(
        self,
        graph: DecodingGraph,
        prompt: VideoPrompt,
        options: GenerationOptions,
        prefixes: PrefixStore | None = None,
        speculate: bool = True,
        started: Callable[[], object] = bool,
    ) -> Call:
        """Submit a request to decode a prompt. The request fails at its start if memory does not suffice.

        Args:
            graph: The models and strategies.
            prompt: The prompt.
            options: The request's options.
            prefixes: Store of KV cache rows to use instead of the graph's.
            speculate: False decodes with the target alone.
            started: Called once there is room for the request.

        Raises:
            UserError: There can never be room for the request.
        """

        def decoding() -> Decoding:
            started()
            check_request(graph, prompt, options)
            if speculate:
                yield from graph.work(prompt, options, prefixes)
            else:
                rule, kept = own_rule(graph.sampling), graph.prefixes if prefixes is None else prefixes
                yield from autoregressive_work(graph.target, prompt, options, rule, graph.caches, graph.engine, kept)

        return self.submit(decoding(), (graph.pruner, graph.drafter, graph.verifier), cache_bytes(graph, prompt, options))


class Call:
    """A submitted request. Iterate over it for its steps. Any thread may cancel it.

    Attributes:
        cancelled: Whether it was cancelled before its end.
    """

    def __init__(self, requests: Requests, work: Decoding, size: int = 0) -> None:
        self._requests, self._ticket = requests, requests.scheduler.submit(work, size)
        self._ended = self.cancelled = False

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps. Raises OutOfMemory if memory runs out, or the error that ended the request."""
        try:
            while (step := self._requests.scheduler.step(self._ticket)) is not None:
                yield step
            self._ended = not self.cancelled
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            self._requests.caches.empty()  # those of running requests stay until these end
            if self._requests.prefixes is not None:
                self._requests.prefixes.empty()
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
    """The requests of one call of a session. Any thread may cancel them together, even before they are submitted."""

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
        requests: Submits the requests.
        graph: The models and strategies.
        prompt: The prompt.
        every: Options of each request.
        calls: Lets another thread cancel the requests.
        speculate: False decodes with the target alone.
        started: Called once there is room for a request.
    """
    calls = calls or Calls()
    with shared_by(graph, prompt, len(every)) as prefixes:
        rest = (prefixes, speculate, started)
        try:
            yield [calls.add(partial(requests.work, graph, prompt, options, *rest)) for options in every]
        finally:
            calls.cancel()


@contextmanager
def shared_by(graph: DecodingGraph, prompt: VideoPrompt, count: int) -> Iterator[PrefixStore | None]:
    """Yield the store of KV cache rows in which `count` requests share the prefill of their prompt.

    That is the graph's own store, maybe None, if there is one request or the prompt takes at most half of that store.
    Otherwise it is a new store, for this block only.
    """
    own, size = graph.prefixes, kv_bytes(graph.target, len(prompt), graph.target.dtype)
    if count < 2 or (own is not None and 2 * size <= own.shelf.device_bytes):
        yield own
        return
    store = PrefixStore(2**62)
    try:
        yield store
    finally:
        store.empty()
