"""Answer chat completions with replicas: read a request, send it to its video's replica, and pass the answer on."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from hashlib import sha256
from time import monotonic
from typing import Any, Protocol, TypeVar

from starlette.datastructures import Headers

from specvlm.serve.admission import Admission
from specvlm.serve.body import Body, Gone, Message, Receive, Send, SlowReader, abort, check_type, sent, until_disconnected
from specvlm.serve.chat import BODIES, told_of
from specvlm.serve.errors import DRAINING, ApiError, busy
from specvlm.serve.ray.numbers import merged
from specvlm.serve.ray.settings import RaySettings
from specvlm.serve.settings import MIB
from specvlm.serve.wire import event

T = TypeVar("T")
SOON_S = 10.0  # seconds that a call of replicas may take, unless it answers a request
VIEWS = 1024  # answers whose key is remembered, to find the replica that keeps what its drafter saw
REPLICA = b"x-specvlm-replica"  # header that names the replica of an answer


class Lost(Exception):
    """The replica of a request has ended."""


class Replicas(Protocol):
    """Replicas that answer requests. All methods raise Lost if a replica, or Ray, ends meanwhile."""

    def answer(self, raw: bytes, key: str | None, waited_s: float) -> AsyncGenerator[Any, None]:
        """Send a request to a replica. Closing the iterator ends the request.

        Args:
            raw: The request's body.
            key: Requests with equal keys go to the same replica while it has room. None: to any replica.
            waited_s: Seconds that the request has waited already.

        Yields:
            The name of the replica that has taken the request, then the ASGI messages of the answer.

        Raises:
            Lost: The replica has ended.
        """

    async def defaults(self) -> dict[str, Any]:
        """Return the default options of requests."""

    async def view(self, name: str, key: str | None) -> dict[str, Any] | None:
        """Return what the drafter saw for the answer with the id `name`. key: The key its request was sent with."""

    async def numbers(self) -> dict[str, bytes]:
        """Return the metrics of each replica, by its name, in Prometheus' text format."""

    async def running(self) -> int:
        """Return the number of running replicas."""


class RoutedChat:
    """The endpoint of chat completions of the front, our HTTP server, which loads no model. For one event loop.

    Limits clients as the endpoint of a server without replicas does.

    Args:
        replicas: Replicas that answer the requests.
        settings: Limits.
        model: Name of the model in requests.

    Attributes:
        settings: The settings.
        model: Name of the model in requests.
        admission: Counts requests and the bytes of their bodies.
    """

    def __init__(self, replicas: Replicas, settings: RaySettings, model: str) -> None:
        self.settings, self.model, self._replicas = settings, model, replicas
        self.admission = Admission(settings.most_requests, 0, BODIES * settings.max_body_mib * MIB)
        self._keys: OrderedDict[str, str | None] = OrderedDict()  # of requests, by the names of their answers
        self._parser = ThreadPoolExecutor(1, "specvlm-key")  # one large body at a time
        self._running: set[asyncio.Task[None]] = set()
        self._cut_off, self._defaults = False, dict[str, Any]()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self.admission.draining

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI application. An error before the answer's first byte sets the HTTP status."""
        body = Body(self.admission, self.settings.max_body, self.settings.body_timeout)
        try:
            self.admission.check()
            headers = Headers(scope=scope)
            check_type(headers)
            raw = await body.read(headers, receive)
            self.admission.check()  # the server may have begun to shut down meanwhile
            key = await asyncio.get_running_loop().run_in_executor(self._parser, video_key, raw)
            await until_disconnected(self._counted(raw, key, send), receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except SlowReader:
            abort(scope)
        except Gone:
            pass
        finally:
            body.release()

    async def _counted(self, raw: bytes, key: str | None, send: Send) -> None:
        """Answer a request, and count it as running meanwhile. Raises ApiError if it is refused."""
        await self.admission.enter(monotonic())
        begin, task = monotonic(), asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await self._answer(raw, key, send)
        finally:
            self._running.discard(task)
            self.admission.leave(monotonic() - begin)

    async def _answer(self, raw: bytes, key: str | None, send: Send) -> None:
        """Send a request to a replica. If the replica ends before the answer begins, retry, up to `retries` times."""
        begin = monotonic()
        for _ in range(1 + self.settings.retries):
            passed = Passed(send, self.settings.write_timeout, partial(self._remember, key))
            try:
                async with aclosing(self._replicas.answer(raw, key, monotonic() - begin)) as messages:
                    await self._taken(messages, passed, begin + self.settings.queue_timeout)
                    async for one in messages:
                        await passed(one)
                return
            except Lost:
                if not passed.begun:
                    continue
                error = _lost()
            except asyncio.CancelledError:
                if not self._cut_off:
                    raise
                error = ApiError(DRAINING, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})
            except SlowReader:
                raise
            except Exception as fault:
                error = told_of(fault)
            await passed.fail(error)
            return
        raise _lost()

    async def _taken(self, messages: AsyncGenerator[Any, None], passed: Passed, deadline: float) -> None:
        """Wait until a replica has taken a request, and note the replica's name. Raises ApiError at the deadline."""
        try:
            async with asyncio.timeout(max(0.0, deadline - monotonic())):
                passed.replica = str(await anext(messages))
        except TimeoutError:
            raise busy("the request did not start in time: try again later", self.admission.retry_after) from None

    def _remember(self, key: str | None, name: str) -> None:
        """Remember the key of a request by the name of its answer."""
        self._keys[name] = key
        while len(self._keys) > VIEWS:
            self._keys.popitem(last=False)

    async def defaults(self) -> dict[str, Any]:
        """Return the default options of requests, which are the same for all replicas."""
        self._defaults = self._defaults or await _soon(self._replicas.defaults())
        return self._defaults

    async def view(self, name: str) -> dict[str, Any] | None:
        """Return what the drafter saw for the answer with this id; None if that is not kept any more."""
        return await _soon(self._replicas.view(name, self._keys[name])) if name in self._keys else None

    async def numbers(self) -> bytes:
        """Return the metrics of all replicas in Prometheus' text format."""
        return merged(await _soon(self._replicas.numbers()))

    async def is_ready(self) -> bool:
        """Whether a replica runs. False too if Ray does not answer in time."""
        try:
            return await _soon(self._replicas.running()) > 0
        except ApiError:
            return False

    async def drain(self) -> None:
        """Refuse new requests and wait until all have ended. After `shutdown_timeout`, cut off those that have not."""
        self.admission.draining = True
        end = monotonic() + self.settings.shutdown_timeout
        while self._running and monotonic() < end:
            await asyncio.sleep(0.02)
        self._cut_off = True
        for task in [*self._running]:
            task.cancel()
        self._parser.shutdown(wait=False)


class Passed:
    """Passes the ASGI messages of an answer on to the client.

    Holds the response's status and headers back until the first part of its body. If the replica ends before that,
    nothing was written yet, and the request can go to another replica.

    Args:
        send: Writes to the client.
        seconds: Seconds within which the client must read a message.
        started: Called with the answer's id before anything is written.

    Attributes:
        replica: Name of the replica, for a header. Set it before the first message.
        begun: Whether anything was written.
    """

    def __init__(self, send: Send, seconds: float, started: Callable[[str], None]) -> None:
        self._send, self._seconds, self._started, self._start = send, seconds, started, dict[str, Any]()
        self.replica, self.begun = "", False

    async def __call__(self, message: Message) -> None:
        """Pass a message on. Raises SlowReader if the client does not read."""
        if message["type"] == "http.response.start":
            self._start = dict(message) | {"headers": [*message["headers"], (REPLICA, self.replica.encode())]}
            if name := dict(message["headers"]).get(b"x-request-id"):
                self._started(name.decode())
            return
        if not self.begun:
            self.begun = True
            await sent(self._send, self._start, self._seconds)
        await sent(self._send, message, self._seconds)

    async def fail(self, error: ApiError) -> None:
        """End the stream with an error in OpenAI's form. Raises the error instead if nothing was written yet."""
        if not self.begun:
            raise error
        await sent(self._send, {"type": "http.response.body", "body": event(error.body), "more_body": False}, self._seconds)


def video_key(raw: bytes) -> str | None:
    """Return a digest of the URL of a body's first video or image; None if it has none, or cannot be parsed."""
    try:
        messages = json.loads(raw)["messages"]
        parts = [part for one in messages if isinstance(one["content"], list) for part in one["content"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return next((sha256(url.encode("utf-8", "replace")).hexdigest() for part in parts if (url := _url(part))), None)


def _url(part: Any) -> str | None:
    """Return the URL in a part of a message; None if it has none."""
    if not isinstance(part, Mapping):
        return None
    given = part.get("video_url", part.get("image_url"))
    found = given.get("url") if isinstance(given, Mapping) else given
    return found if isinstance(found, str) else None


async def _soon(asked: Awaitable[T]) -> T:
    """Wait for a call of replicas. Raises ApiError after `SOON_S`, when all must be full, or if a replica ends."""
    try:
        async with asyncio.timeout(SOON_S):
            return await asked
    except TimeoutError:
        raise busy("all replicas are full: try again later", 5) from None
    except Lost:
        raise _lost() from None


def _lost() -> ApiError:
    told = "the replica that answered has ended: send the request again"
    return ApiError(DRAINING, told, code="replica_lost", headers={"retry-after": "5"})
