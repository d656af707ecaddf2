"""A session: a loaded pair that answers prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.shared import SharedScheduler
from specvlm.decoding.slices import STALL_S
from specvlm.decoding.watch import Watch
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.models.known_videos import KnownVideos
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.session.call import Call, Calls, Requests, begun
from specvlm.session.inputs import Reading, read
from specvlm.session.options import Options, Penalties
from specvlm.session.result import GenerationResult, result_of
from specvlm.session.room import check_answers, room_for
from specvlm.session.stream import TextStream
from specvlm.strategies.verifiers.coupled import own_rule
from specvlm.types import GenerationOptions, Step

T = TypeVar("T")
MOST_CALLS = 256  # threads that wait for calls from asyncio


class Asked(NamedTuple):
    """A call's options, the graph built from them, and its prompt."""

    options: Options
    graph: DecodingGraph
    reading: Reading


class Session:
    """A target, a draft and default options, from `load_pair`. Safe to use from several threads and from asyncio.

    Calls that overlap share forward passes. Each call has its own options, caches and random numbers, so it gets the
    answer that it would get alone. Nothing needs to be closed.

    Attributes:
        target: The target model.
        draft: The draft model, or None.
        options: Default options of calls.
        engine: Runs the passes.
        caches: KV caches, kept between calls.
        prefixes: KV cache rows of prompts, for later calls with the same beginning; None if nothing is kept.
        videos: Remembers files that were read, which need not be decoded again; None if nothing is kept.
        scheduler: Runs the requests; counts passes asked for (`asked`) and engine calls that served them (`run`).
        requests: Submits requests to the scheduler.
    """

    def __init__(
        self,
        target: VideoLM,
        draft: VideoLM | None,
        vocabulary: int,
        engine: Engine,
        options: Options,
        prefixes: PrefixStore | None = None,
        stall_ms: float = 1000 * STALL_S,
    ) -> None:
        self.target, self.draft, self.options = target, draft, options
        self._vocabulary, self.engine, self.caches = vocabulary, engine, CachePool()
        models = [target, *([] if draft is None else [draft])]
        self.prefixes, self.videos = prefixes, None if prefixes is None else KnownVideos()
        self.scheduler = SharedScheduler(engine, target.device, room_for(models, prefixes), stall_s=stall_ms / 1000)
        watch = Watch(models, self.caches, engine)
        self.requests = Requests(self.scheduler, self.caches, watch, prefixes)
        self._threads = ThreadPoolExecutor(MOST_CALLS, "specvlm")  # starts threads only as they are needed
        self.graph(options)  # a default that does not fit the pair fails here

    @overload
    def generate(
        self, prompt: Any, videos: Any = None, images: Any = None, *, n: None = None, **options: Any
    ) -> GenerationResult: ...
    @overload
    def generate(
        self, prompt: Any, videos: Any = None, images: Any = None, *, n: int, **options: Any
    ) -> list[GenerationResult]: ...
    def generate(
        self, prompt: Any, videos: Any = None, images: Any = None, *, n: int | None = None, **options: Any
    ) -> GenerationResult | list[GenerationResult]:
        """Answer a prompt.

        Args:
            prompt: The question; chat messages in the form of Hugging Face's templates, with videos and images in their
                parts; the output of the model's Hugging Face processor; or a `VideoPrompt`.
            videos: A video or several: paths, names of embedded clips, bytes of files, uint8 arrays or tensors of
                frames, lists of frames, or clips of `read_video` and `clip_from_frames`. They come before the question,
                or in place of the messages' parts {"type": "video"}.
            images: An image or several: paths, bytes, arrays, tensors or Pillow images.
            n: Number of answers to draw after one prefill.
            options: See `Options`.

        Returns:
            A `GenerationResult`; with `n`, a list of them.

        Raises:
            UserError: The prompt, a video or an option cannot be used.
        """
        return self._generated(*self.prepare(prompt, videos, images, options | ({} if n is None else {"n": n})))

    def stream(self, prompt: Any, videos: Any = None, images: Any = None, **options: Any) -> TextStream:
        """Answer a prompt piece by piece: the text of each round as soon as it is decoded.

        Args: As in `generate`, without `n`.

        Returns:
            An iterator of texts in whole characters. Closing it, or leaving its `with` block, ends the request and
            frees its caches.

        Raises:
            UserError: As `generate` does.
        """
        return self._streamed(*self.prepare(prompt, videos, images, options))

    @overload
    async def generate_async(
        self, prompt: Any, videos: Any = None, images: Any = None, *, n: None = None, **options: Any
    ) -> GenerationResult: ...
    @overload
    async def generate_async(
        self, prompt: Any, videos: Any = None, images: Any = None, *, n: int, **options: Any
    ) -> list[GenerationResult]: ...
    async def generate_async(
        self, prompt: Any, videos: Any = None, images: Any = None, *, n: int | None = None, **options: Any
    ) -> GenerationResult | list[GenerationResult]:
        """Answer a prompt as `generate` does, without blocking the event loop. Cancelling it ends the request."""
        given = options | ({} if n is None else {"n": n})
        asked = await self._in_thread(lambda: self.prepare(prompt, videos, images, given))
        calls = Calls()
        try:
            return await self._in_thread(lambda: self._generated(*asked, calls))
        finally:
            calls.cancel()

    async def stream_async(
        self, prompt: Any, videos: Any = None, images: Any = None, **options: Any
    ) -> AsyncGenerator[str, None]:
        """Answer a prompt as `stream` does, as an asynchronous iterator. Cancelling or closing it ends the request."""
        pieces = self._streamed(*await self._in_thread(lambda: self.prepare(prompt, videos, images, options)))
        try:
            while (piece := await self._in_thread(lambda: next(pieces, None))) is not None:
                yield piece
        finally:
            pieces.cancel()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def prepare(self, prompt: Any, videos: Any, images: Any, options: Mapping[str, Any]) -> Asked:
        """Check the options of a call, then read videos and images. Arguments and errors are those of `generate`."""
        asked = self.options.asked(options)
        return Asked(asked, self.graph(asked), read(self.target, prompt, videos, images, asked, self.videos))

    def graph(self, options: Options) -> DecodingGraph:
        """Build the `DecodingGraph` of a call. Raises UserError if its strategies do not fit the models."""
        asked = options.generation()
        if isinstance(asked.adjust, Penalties):
            asked.adjust.check(self.target.vocabulary)
        models = (self.target, self.draft, *options.strategies())
        return DecodingGraph(*models, asked, self._vocabulary, self.caches, self.engine, self.prefixes)

    def _streamed(self, asked: Options, graph: DecodingGraph, reading: Reading) -> TextStream:
        """Begin a stream. Raises UserError for options that a stream does not support."""
        for name in ("n", "check"):
            if getattr(asked, name):
                raise UserError(f"{name}={getattr(asked, name)}: a stream is one answer, not compared: call generate")
        call = self.requests.work(graph, reading.prompt, graph.options, speculate=asked.speculate)
        return TextStream(self.target, reading, graph.options, call)

    def _generated(
        self, asked: Options, graph: DecodingGraph, reading: Reading, calls: Calls | None = None
    ) -> GenerationResult | list[GenerationResult]:
        """Decode one answer, or `n`. calls: For another thread to cancel them, which raises Cancelled here."""
        calls, found = calls or Calls(), []
        with self.begun(Asked(asked, graph, reading), calls) as answers:
            for options, call in answers:
                steps = calls.steps(call)
                verdict = self._verdict(graph, reading, options, steps, calls) if asked.check else "not checked"
                found.append(result_of(self.target, reading, options, steps, verdict))
        return found if asked.n else found[0]

    @contextmanager
    def begun(
        self, asked: Asked, calls: Calls, started: Callable[[], object] = bool
    ) -> Iterator[list[tuple[GenerationOptions, Call]]]:
        """Submit the answers of a call, which share its prefill; at the end of the block, cancel those still running.

        Args:
            asked: From `prepare`.
            calls: For another thread to cancel the answers.
            started: Called once there is room for an answer.

        Yields:
            Options of each answer, and its steps.
        """
        options, graph, reading = asked
        check_answers(self.target, len(reading.prompt) + options.max_new_tokens, options.n or 1)
        every = [replace(graph.options, seed=graph.options.seed + number) for number in range(options.n or 1)]
        with begun(self.requests, graph, reading.prompt, every, calls, options.speculate, started) as mine:
            yield list(zip(every, mine, strict=True))

    def _verdict(
        self, graph: DecodingGraph, reading: Reading, options: GenerationOptions, steps: list[Step], calls: Calls
    ) -> str:
        """Decode with the target alone and compare."""
        if not graph.lossless:
            return "lossy"
        if graph.sampling.temperature > 0 and not graph.sampling.coupled:
            return "sampled"
        alone = (self.target, reading.prompt, options, own_rule(graph.sampling), self.caches, self.engine)
        baseline = tokens_of(calls.steps(calls.add(lambda: self.requests.submit(autoregressive_work(*alone)))))
        rest = (self.caches, self.engine, steps, graph.verifier, options, graph.sampling)
        compared = partial(lossless.compare, self.target, reading.prompt, baseline, tokens_of(steps), *rest)
        return str(self.scheduler.between(compared))
