"""A session: a loaded pair that answers prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self, TypeVar

from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prefill import SharedPrefill
from specvlm.decoding.scheduler import Decoding, Ticket
from specvlm.decoding.shared import SharedScheduler
from specvlm.decoding.text import AnswerText
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.session.inputs import Reading, read
from specvlm.session.options import Options
from specvlm.session.result import GenerationResult, result_of
from specvlm.strategies.verifiers.coupled import own_rule
from specvlm.types import GenerationOptions, Step

T = TypeVar("T")
MOST_CALLS = 256  # threads that wait for calls from asyncio


class Session:
    """A target, a draft and default options, from `load_pair`. Safe to use from several threads and from asyncio.

    Calls that overlap share forward passes. Each call has its own options, caches and random numbers, so its answer is
    the one it has alone. Nothing needs to be closed.

    Attributes:
        target: The target model.
        draft: The draft model, or None.
        options: Default options of calls.
        scheduler: Runs the requests; counts passes asked for (`asked`) and engine calls that served them (`run`).
    """

    def __init__(self, target: VideoLM, draft: VideoLM | None, vocabulary: int, engine: Engine, options: Options) -> None:
        self.target, self.draft, self.options = target, draft, options
        self.scheduler = SharedScheduler(engine, target.device)
        self._vocabulary, self._engine, self._caches = vocabulary, engine, CachePool()
        self._threads = ThreadPoolExecutor(MOST_CALLS, "specvlm")  # starts threads only as they are needed
        self._graph(options)  # a default that does not fit the pair fails here

    def generate(self, prompt: Any, videos: Any = None, images: Any = None, **options: Any) -> Any:
        """Answer a prompt.

        Args:
            prompt: The question; chat messages in the form of Hugging Face's templates, with videos and images in their
                parts; the inputs of the model's Hugging Face processor; or a `VideoPrompt`.
            videos: A video or several: paths, names of embedded clips, bytes of files, uint8 arrays or tensors of
                frames, lists of frames, or clips of `read_video` and `clip_from_frames`. They come before the question,
                or in place of the messages' parts {"type": "video"}.
            images: An image or several, given alike.
            options: See `Options`.

        Returns:
            A `GenerationResult`; with `n`, a list of them.

        Raises:
            UserError: The prompt, a video or an option cannot be used.
        """
        return self._generated(*self._prepared(prompt, videos, images, options))

    def stream(self, prompt: Any, videos: Any = None, images: Any = None, **options: Any) -> TextStream:
        """Answer a prompt piece by piece: the text of each round as soon as it is decoded.

        Args: As in `generate`, without `n`.

        Returns:
            An iterator of texts in whole characters. Closing it, or leaving its `with` block, ends the request and frees
            its caches.

        Raises:
            UserError: As `generate` does.
        """
        return self._streamed(*self._prepared(prompt, videos, images, options))

    async def generate_async(self, prompt: Any, videos: Any = None, images: Any = None, **options: Any) -> Any:
        """Answer a prompt as `generate` does, without blocking the event loop. Cancelling it ends the request."""
        asked = await self._in_thread(lambda: self._prepared(prompt, videos, images, options))
        calls: list[_Call] = []
        try:
            return await self._in_thread(lambda: self._generated(*asked, calls))
        finally:
            for call in calls:
                call.cancel()

    async def stream_async(self, prompt: Any, videos: Any = None, images: Any = None, **options: Any) -> AsyncIterator[str]:
        """Answer a prompt as `stream` does, as an asynchronous iterator. Cancelling or closing it ends the request."""
        pieces = self._streamed(*await self._in_thread(lambda: self._prepared(prompt, videos, images, options)))
        try:
            while (piece := await self._in_thread(lambda: next(pieces, None))) is not None:
                yield piece
        finally:
            pieces.cancel()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _prepared(self, prompt: Any, videos: Any, images: Any, options: dict[str, Any]) -> tuple[Options, Reading]:
        asked = self.options.asked(options)
        return asked, read(self.target, prompt, videos, images, asked)

    def _graph(self, options: Options) -> DecodingGraph:
        """Build the graph of a call. Raises UserError if the strategies do not fit the models."""
        strategies = options.strategies()
        models = self.target, self.draft
        return DecodingGraph(*models, *strategies, options.generation(), self._vocabulary, self._caches, self._engine)

    def _streamed(self, asked: Options, reading: Reading) -> TextStream:
        """Begin a stream. Raises UserError for options that only whole results can have."""
        for name in ("n", "check"):
            if getattr(asked, name):
                raise UserError(f"{name}={getattr(asked, name)}: a stream is one answer, not compared: call generate")
        graph = self._graph(asked)
        return TextStream(self.target, reading, graph.options, _Call(self.scheduler, graph.work(reading.prompt)))

    def _generated(self, asked: Options, reading: Reading, calls: list[_Call] | None = None) -> Any:
        """Decode one answer, or `n`. calls: Receives the requests, for another thread to cancel them."""
        graph, count, calls = self._graph(asked), asked.n or 1, [] if calls is None else calls
        every = [replace(graph.options, seed=graph.options.seed + number) for number in range(count)]
        with SharedPrefill(self.target, self._caches, count) as shared:
            try:
                calls += [
                    _Call(self.scheduler, graph.work(reading.prompt, options, shared if count > 1 else None))
                    for options in every
                ]
                results = [
                    self._result(graph, asked, reading, options, list(call)) for options, call in zip(every, calls, strict=True)
                ]
            finally:
                for call in calls:
                    call.cancel()
        return results if asked.n else results[0]

    def _result(
        self, graph: DecodingGraph, asked: Options, reading: Reading, options: GenerationOptions, steps: list[Step]
    ) -> GenerationResult:
        verdict = self._verdict(graph, reading, options, steps) if asked.check else "not checked"
        return result_of(self.target, reading, options, steps, verdict)

    def _verdict(self, graph: DecodingGraph, reading: Reading, options: GenerationOptions, steps: list[Step]) -> str:
        """Decode with the target alone and compare."""
        if not graph.lossless:
            return "lossy"
        if graph.sampling.temperature > 0 and not graph.sampling.coupled:
            return "sampled"
        alone = (self.target, reading.prompt, options, own_rule(graph.sampling), self._caches, self._engine)
        baseline = tokens_of(list(_Call(self.scheduler, autoregressive_work(*alone))))
        rest = (self._caches, self._engine, steps, graph.verifier, options, graph.sampling)
        return str(lossless.compare(self.target, reading.prompt, baseline, tokens_of(steps), *rest))


class _Call:
    """A submitted request: an iterator of its steps. Any thread may cancel it."""

    def __init__(self, scheduler: SharedScheduler, work: Decoding) -> None:
        self._scheduler = scheduler
        self._ticket: Ticket = scheduler.submit(work)

    def __iter__(self) -> Iterator[Step]:
        try:
            while (step := self._scheduler.step(self._ticket)) is not None:
                yield step
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request, unless it has ended."""
        self._scheduler.cancel(self._ticket)


class TextStream(Iterator[str]):
    """The text of an answer as it is decoded, in whole characters.

    Attributes:
        result: The `GenerationResult`, after the last piece. None before, and if the stream was closed.
    """

    def __init__(self, target: VideoLM, reading: Reading, options: GenerationOptions, call: _Call) -> None:
        self.result: GenerationResult | None = None
        self._call = call
        self._pieces = self._decode(target, reading, options)

    def __next__(self) -> str:
        return next(self._pieces)

    def _decode(self, target: VideoLM, reading: Reading, options: GenerationOptions) -> Iterator[str]:
        text, steps = AnswerText(target.tokenizer, options.stop), list[Step]()
        for step in self._call:
            steps.append(step)
            if piece := "".join(text.put(token) for token in step.tokens):
                yield piece
        self.result = result_of(target, reading, options, steps, "not checked")
        if piece := text.end():
            yield piece

    def cancel(self) -> None:
        """End the request. Any thread may call this, also while another waits for a piece."""
        self._call.cancel()

    def close(self) -> None:
        """End the request and free its caches: now, or at the end of the round that is running."""
        self.cancel()
        self._pieces = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
