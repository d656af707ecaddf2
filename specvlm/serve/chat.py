"""Answer chat completions: admit a request, decode it, and send its answer as it is decoded."""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from contextlib import suppress
from time import monotonic, perf_counter
from typing import Any

from starlette.datastructures import Headers

from specvlm.errors import OutOfMemory, StrategyError, UserError, message, one_line
from specvlm.serve.admission import Admission
from specvlm.serve.body import Body, Gone, Message, Receive, Send, SlowReader, abort, check_type, sent, until_disconnected
from specvlm.serve.chat_request import ChatRequest, chat_request
from specvlm.serve.errors import DRAINING, FAULT, ApiError, bad, busy
from specvlm.serve.generation import Ended, Event, Failed, Generation, Round, Threads
from specvlm.serve.media import MediaReader
from specvlm.serve.metrics import Metrics
from specvlm.serve.reading import SERVER
from specvlm.serve.settings import MIB, Settings
from specvlm.serve.views import Views, view_of, with_kept
from specvlm.serve.wire import DONE, Completion, event, new_id
from specvlm.session.session import Asked, Session
from specvlm.video.video import Clip

STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
BODIES = 16  # bodies of the largest size that may be held together


class Chat:
    """The endpoint of chat completions, for one event loop.

    Args:
        session: Session that decodes.
        settings: Limits.
        model: Name of the model.

    Attributes:
        session: The session.
        settings: The settings.
        model: Name of the model.
        admission: Admits requests.
        metrics: Counts requests.
        views: What the drafter saw of the videos of recent requests.
    """

    def __init__(self, session: Session, settings: Settings, model: str) -> None:
        self.session, self.settings, self.model = session, settings, model
        self.admission = Admission(settings.running, settings.queue, BODIES * settings.max_body_mib * MIB)
        self.metrics, self.views = Metrics(session, self.admission, model, settings.metrics_prefix), Views()
        self._media, self._threads = MediaReader(session, settings), Threads(settings.running)
        self._running: set[Generation] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI application. An error before the answer's first byte sets the HTTP status."""
        arrival = perf_counter() - _waited(scope)
        body = Body(self.admission, self.settings.max_body, self.settings.body_timeout)
        try:
            self.admission.check()
            check_type(Headers(scope=scope))
            raw = await body.read(Headers(scope=scope), receive)
            request = await asyncio.to_thread(chat_request, raw, self.session.options)
            del raw
            if request.model != self.model:
                told = f"the model {request.model!r} does not exist; this server has {self.model!r}"
                raise ApiError(404, told, param="model", code="model_not_found")
            await until_disconnected(Answer(self, request, arrival, send, scope).run(body), receive)
        except ApiError as error:
            self.metrics.answered(error.status)
            await error.response()(scope, receive, send)
        except Gone:
            self.metrics.cancelled()
        finally:
            body.release()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused, since the server is shutting down."""
        return self.admission.draining

    async def defaults(self) -> dict[str, Any]:
        """Return the default options of requests."""
        options = self.session.options
        strategies = {kind: one.name for kind, one in zip(("pruner", "drafter", "verifier"), options.strategies(), strict=True)}
        return strategies | {"max_new_tokens": options.max_new_tokens, "ratio": options.ratio}

    async def view(self, name: str) -> dict[str, Any] | None:
        """Return what the drafter saw for an answer, by the answer's id; None if it is not, or no longer, kept."""
        return self.views.get(name)

    async def numbers(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return self.metrics.text()

    async def is_ready(self) -> bool:
        """Whether requests can be answered now: always, since the session is loaded."""
        return True

    def prepare(self, request: ChatRequest, body: Body, name: str) -> Asked:
        """Read a request's media and prompt. Runs in a thread. Raises ApiError or UserError if they cannot be used."""
        target, options = self.session.target, dict(request.options)
        if request.ignore_eos or request.stop_ids:
            own = set() if request.ignore_eos else set(target.stop_ids)
            options["stop_ids"] = sorted(own | set(request.stop_ids))
        self.session.graph(self.session.options.asked(options))  # options that do not fit fail before anything is read
        media = self._media.read(request)
        sampled = {"frames": None, "fps": None}  # the server's own are for files, and these videos are read already
        asked = self.session.prepare(media.messages, None, None, options | sampled)
        self._check_length(asked)
        if request.explain:
            self.views.put(name, view_of([clip for clip in media.clips if isinstance(clip, Clip)], asked.reading.prompt.grids))
        request.messages.clear()  # the body's data
        return asked

    def _check_length(self, asked: Asked) -> None:
        """Raise ApiError if prompt and answers are longer than allowed."""
        config, prompt = self.session.target.text.config, len(asked.reading.prompt)
        context = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        most, answer = self.settings.max_prompt_tokens or context, asked.options.max_new_tokens
        if prompt > most:
            raise bad(f"the prompt has {prompt} tokens, at most {most} are allowed", "messages", "context_length_exceeded")
        limit = self.settings.max_answer_tokens or context
        if answer * (asked.options.n or 1) > limit or prompt + answer > context:
            there = f"the prompt's {prompt} and {asked.options.n or 1} answers of at most {answer} tokens"
            raise bad(f"{there} are more than {min(limit, context)}: lower max_tokens", "max_tokens", "context_length_exceeded")

    def begin(self, request: ChatRequest, body: Body, name: str) -> Generation:
        """Start an admitted request. Its place is freed when no thread works on it any more."""
        loop, start = asyncio.get_running_loop(), monotonic()
        generation = Generation(self.session, self._threads, lambda: self.prepare(request, body, name), request.explain)
        self._running.add(generation)

        def left() -> None:
            self._running.discard(generation)
            self.admission.leave(monotonic() - start)

        def done(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(left)

        generation.done.add_done_callback(done)
        return generation

    async def drain(self) -> None:
        """Refuse new requests and wait until all have ended. Those that exceed `shutdown_timeout` get an error."""
        self.admission.draining = True
        end = monotonic() + self.settings.shutdown_timeout
        while (self._running or self.admission.waiting) and monotonic() < end:
            await asyncio.sleep(0.02)
        ended = ApiError(DRAINING, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})
        self.admission.refuse(ended)
        for generation in [*self._running]:
            generation.fail(ended)
        if self._running:
            SERVER.stop()  # threads that wait for a video
        end = monotonic() + 5
        while self._running and monotonic() < end:
            await asyncio.sleep(0.02)


class Answer:
    """Answers one request.

    Args:
        chat: The endpoint.
        request: The request.
        arrival: Time of its arrival, by `perf_counter`.
        send: Sends to the client.
        scope: ASGI's scope.
    """

    def __init__(self, chat: Chat, request: ChatRequest, arrival: float, send: Send, scope: Message) -> None:
        self._chat, self._request, self._arrival, self._send, self._scope = chat, request, arrival, send, scope
        self._name, self._last, self._begun = new_id(), dict[int, float](), False

    async def run(self, body: Body) -> None:
        """Wait for a place, then decode and send the answer.

        Raises ApiError for an error before the first byte is sent. A later error is sent as the last event.
        """
        chat, deadline = self._chat, monotonic() + self._chat.settings.queue_timeout - _waited(self._scope)
        await chat.admission.enter(deadline)
        generation = chat.begin(self._request, body, self._name)
        try:
            asked = await generation.started(deadline, self._late)
            body.release()
            chat.metrics.started(self._arrival, len(asked.reading.prompt))
            completion = Completion(self._request, chat.model, asked, chat.session.target.tokenizer, self._name)
            await (self._stream if self._request.stream else self._whole)(generation, completion)
            chat.metrics.answered(200)
        except SlowReader:
            chat.metrics.cancelled()
            abort(self._scope)
        except Exception as error:
            told = told_of(error)
            error.__traceback__ = None  # its frames refer to it, and to the request's pixels
            if not self._begun:
                raise told from None
            chat.metrics.answered(told.status)
            with suppress(SlowReader):
                await self._write(event(told.body), last=True)
        finally:
            generation.cancel()

    def _late(self) -> ApiError:
        return busy("the request did not start in time: try again later", self._chat.admission.retry_after)

    async def _whole(self, generation: Generation, completion: Completion) -> None:
        while len(completion.ends) < self._request.answers:
            one = self._seen(await generation.events.get(), completion)
            if isinstance(one, Ended):
                completion.ends[one.answer] = one
        content = json.dumps(completion.whole(), ensure_ascii=False).encode("utf-8", "replace")
        size = (b"content-length", str(len(content)).encode())
        await self._begin([(b"content-type", b"application/json"), size])
        await self._write(content, last=True)

    async def _stream(self, generation: Generation, completion: Completion) -> None:
        """Write a chunk for each round; chunks that are ready at the same time are written together."""
        first = b"".join(event(completion.first(answer)) for answer in range(self._request.answers))
        while len(completion.ends) < self._request.answers:
            found = [await generation.events.get()]
            while not generation.events.empty():
                found.append(generation.events.get_nowait())
            for one in found:
                first += self._chunks(self._seen(one, completion), completion)
            if not self._begun:
                await self._begin(STREAM)
            if first:
                await self._write(first)
            first = b""
        await self._write((event(completion.summary()) if self._request.usage else b"") + DONE, last=True)

    def _chunks(self, one: Round | Ended, completion: Completion) -> bytes:
        found = completion.end(one) if isinstance(one, Ended) else [chunk] if (chunk := completion.round(one)) else []
        return b"".join(map(event, found))

    def _seen(self, one: Event, completion: Completion) -> Round | Ended:
        """Count an event and return it. Raises the error of a `Failed`."""
        if isinstance(one, Failed):
            raise one.error
        if isinstance(one, Round):
            self._chat.metrics.round(one, self._last.get(one.answer), self._arrival)
            self._last[one.answer] = one.at
            if one.step.keep is not None and (view := self._chat.views.get(self._name)):
                with_kept(view, one.step.keep, completion.asked.reading.prompt.grids)
        if isinstance(one, Ended):
            self._chat.metrics.ended(one, self._arrival)
        assert isinstance(one, Round | Ended)
        return one

    async def _begin(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._begun = True
        own = [*headers, (b"x-request-id", self._name.encode())]
        await self._sent({"type": "http.response.start", "status": 200, "headers": own})

    async def _write(self, content: bytes, last: bool = False) -> None:
        await self._sent({"type": "http.response.body", "body": content, "more_body": not last})

    async def _sent(self, what: Message) -> None:
        await sent(self._send, what, self._chat.settings.write_timeout)


def told_of(error: BaseException) -> ApiError:
    """Convert the exception that ended a request to an error for its client. Prints an unexpected one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OutOfMemory):
        return ApiError(DRAINING, message(error), code="out_of_memory", headers={"retry-after": "5"})
    if isinstance(error, UserError):
        return bad(message(error))
    if isinstance(error, StrategyError):
        return ApiError(FAULT, one_line(error), code="strategy_error")
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(FAULT, f"internal server error ({type(error).__name__})", code="server_error")


def _waited(scope: Message) -> float:
    """Seconds that a request has already waited for this replica; 0 in a server without replicas."""
    return float(scope.get("state", {}).get("waited_s", 0.0))
