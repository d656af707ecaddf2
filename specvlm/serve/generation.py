"""Read and decode a request in threads, and post its events to the event loop in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, perf_counter

from specvlm.decoding.text import AnswerText
from specvlm.serve.chat_body import MOST_ANSWERS
from specvlm.serve.errors import ApiError
from specvlm.serve.marks import Marks
from specvlm.session.call import Call, Calls, Cancelled
from specvlm.session.result import GenerationResult, result_of
from specvlm.session.session import Asked, Session
from specvlm.types import GenerationOptions, Step


@dataclass(frozen=True)
class Started:
    """The prompt is read, and there is room for the request."""

    asked: Asked


@dataclass(frozen=True)
class Round:
    """A round of an answer.

    Attributes:
        answer: Number of the answer.
        step: What the round decoded.
        text: Text that the round adds to the answer.
        marks: Words of the round, from `Marks.of`; None unless the request asks for them.
        at: Time when the round ended, by `perf_counter`.
    """

    answer: int
    step: Step
    text: str
    marks: dict[str, object] | None
    at: float


@dataclass(frozen=True)
class Ended:
    """The end of an answer: the rest of its text, its result and its rounds."""

    answer: int
    text: str
    result: GenerationResult
    steps: list[Step]


@dataclass(frozen=True)
class Failed:
    """The request has failed."""

    error: BaseException


Event = Started | Round | Ended | Failed


class Threads:
    """Threads of the requests: one for each running request, more for its further answers, and one that cancels.

    running: maximum number of requests that run at the same time.
    """

    def __init__(self, running: int) -> None:
        self.requests = ThreadPoolExecutor(running, "specvlm-request")
        self.answers = ThreadPoolExecutor(running * MOST_ANSWERS, "specvlm-answer")
        self.cancels = ThreadPoolExecutor(1, "specvlm-cancel")  # ending a request may take a while, for plugins


class Generation:
    """A running request.

    Args:
        session: Session that decodes.
        threads: Threads to run in.
        prepare: Reads the prompt, in a thread.
        explain: Whether to report the words of each round.

    Attributes:
        events: Events that the reader has not taken yet. Without a limit, so that decoding never waits for a slow
            reader: there are few, about one per round of each answer.
        done: Done when no thread works on the request any more.
    """

    def __init__(self, session: Session, threads: Threads, prepare: Callable[[], Asked], explain: bool) -> None:
        self._session, self._threads, self._prepare, self._explain = session, threads, prepare, explain
        self._loop, self._calls, self._cancelled = asyncio.get_running_loop(), Calls(), False
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.done: Future[None] = threads.requests.submit(self._run)

    async def started(self, deadline: float, late: Callable[[], ApiError]) -> Asked:
        """Wait until the request starts. Raises the error that ended it before, or `late()` at the deadline."""
        try:
            async with asyncio.timeout(max(0.0, deadline - monotonic())):
                event = await self.events.get()
        except TimeoutError:
            raise late() from None
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Started)
        return event.asked

    def cancel(self) -> None:
        """End the request after its current round, if it has not ended."""
        if not self._cancelled and not self.done.done():
            self._cancelled = True
            self._threads.cancels.submit(self._calls.cancel)

    def fail(self, error: ApiError) -> None:
        """End the request with an error."""
        self.events.put_nowait(Failed(error))
        self.cancel()

    def _post(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def _run(self) -> None:
        try:
            self._calls.check()
            asked = self._prepare()
            told = iter([Started(asked)])

            def tell() -> None:
                for event in told:  # posted once, by the first of several answers
                    self._post(event)

            with self._session.begun(asked, self._calls, tell) as answers:
                others = [self._threads.answers.submit(self._read, at, asked, *one) for at, one in enumerate(answers) if at]
                try:
                    self._read(0, asked, *answers[0])
                    for other in others:
                        other.result()
                finally:
                    self._calls.cancel() if any(not other.done() for other in others) else None
                    for other in others:
                        other.exception()
        except Cancelled:
            pass
        except BaseException as error:
            self._post(Failed(error))

    def _read(self, answer: int, asked: Asked, options: GenerationOptions, call: Call) -> None:
        """Decode an answer and post its rounds, then its end. Raises Cancelled if the request was cancelled."""
        target, steps = self._session.target, list[Step]()
        text, marks = AnswerText(target.tokenizer, options.stop), Marks(target.tokenizer) if self._explain else None
        for step in call:
            steps.append(step)
            piece = "".join(text.put(token) for token in step.tokens)
            self._post(Round(answer, step, piece, None if marks is None else marks.of(step), perf_counter()))
        self._calls.check()
        if call.cancelled:
            raise Cancelled
        result = result_of(target, asked.reading, options, steps)
        self._post(Ended(answer, text.end(), result, steps))
