"""Run the application: bounds on slow clients, a one-line error for a taken port, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from specvlm.errors import ExitCode, UserError
from specvlm.serve.app import App
from specvlm.serve.body import Message, Receive, Send
from specvlm.serve.errors import CLOSING, DRAINING, ApiError, bad
from specvlm.serve.settings import Settings

MOST_HEADERS = 2**16  # bytes
KEEP_ALIVE_S = 30
MORE_CONNECTIONS = 256  # beyond requests that run or wait


def bound(settings: Settings) -> socket.socket:
    """Bind the port and return its socket, before models are loaded. Raises UserError if that is not possible."""
    where = f"host={settings.host} port={settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"{where}: this machine has no such address ({error.strerror})") from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        return taken
    except OSError as error:
        taken.close()
        raise _taken(settings, error) from None


def _taken(settings: Settings, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port={settings.port} is taken by another program: choose another port, or 0 for any")
    return UserError(f"host={settings.host} port={settings.port} cannot be listened on ({error.strerror})")


class Protocol(H11Protocol):
    """uvicorn's protocol, with limits on slow clients and on connections, and errors in OpenAI's form."""

    header_timeout = 10.0
    write_timeout = 30.0
    most_connections = 1024

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._headers_late: asyncio.TimerHandle | None = None
        self._reader_late: asyncio.TimerHandle | None = None
        self._behind = 0  # bytes that arrived after the body of the running request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers. Beyond `most_connections`, `full` answers instead of the application."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        if len(self.connections) > self.most_connections:
            self.app = full
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop()
        self._stop_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._wait_writing()

    def resume_writing(self) -> None:
        """Stop waiting: the client has read."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection. Aborts it if the client has not read its answer, for which closing would wait."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def data_received(self, data: bytes) -> None:
        """Take data. If headers are not complete, begin to wait for the rest.

        Aborts the connection if too much arrives behind a request that is not answered yet.
        """
        if self._answers:
            self._behind += len(data)
            if self._behind > MOST_HEADERS:
                self.transport.abort()
                return
        super().data_received(data)
        self._read_on()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._headers_late is None and not self.transport.is_closing():
            self._wait()

    def on_response_complete(self) -> None:
        """Go on to the next request if it has arrived. If the connection closes, wait for the client to read."""
        self._behind = 0
        super().on_response_complete()
        self._stop()
        self._read_on()
        if self.transport.is_closing():
            self._wait_writing()  # it closes once everything is written

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP."""
        content = json.dumps(bad(f"this is not an HTTP request: {msg}").body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request")
            for one in (response, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(one) or b"")
        self.transport.close()

    @property
    def _answers(self) -> bool:
        """Whether a request has arrived completely and is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _read_on(self) -> None:
        """Keep reading after a request. uvicorn stops at the next one, and would not notice a disconnect."""
        if self._answers:
            self.flow.resume_reading()

    def _wait_writing(self) -> None:
        if self._reader_late is None:
            self._reader_late = self.loop.call_later(self.write_timeout, self.transport.abort)

    def _stop_writing(self) -> None:
        if self._reader_late is not None:
            self._reader_late.cancel()
            self._reader_late = None

    def _wait(self) -> None:
        self._headers_late = self.loop.call_later(self.header_timeout, self.transport.abort)

    def _stop(self) -> None:
        if self._headers_late is not None:
            self._headers_late.cancel()
            self._headers_late = None


async def full(scope: Message, receive: Receive, send: Send) -> None:
    """Refuse a request on a connection beyond the limit."""
    error = ApiError(DRAINING, "too many connections: try again later", code="busy", headers={"retry-after": "5"} | CLOSING)
    await error.response()(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown. The first signal refuses new requests and lets running ones end.

    Running requests get `shutdown_timeout` seconds. The second signal ends the server immediately.

    Attributes:
        heard: Numbers of the signals received.
    """

    def __init__(self, app: App) -> None:
        settings = app.chat.settings
        bounds = {
            "header_timeout": settings.header_timeout,
            "write_timeout": settings.write_timeout,
            "most_connections": settings.running + settings.queue + MORE_CONNECTIONS,
        }
        protocol = type("BoundProtocol", (Protocol,), bounds)
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=MOST_HEADERS,
        )
        super().__init__(config)
        self._app, self._settings, self.heard = app, settings, list[int]()
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. Raises UserError if the port was taken since it was bound."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except OSError as error:
            raise _taken(self._settings, error) from None
        host, port = (sockets or [])[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"specvlm: {self._app.chat.model} at http://{shown}:{port}", flush=True)

    @property
    def code(self) -> int:
        """The exit code after the signals that came."""
        return ExitCode.INTERRUPTED if signal.SIGINT in self.heard else ExitCode.OK

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal, wait for running requests; at the second, end them."""
        self.heard.append(sig)
        if len(self.heard) > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drained() -> None:
            try:
                await self._app.chat.drain()
            finally:
                self.should_exit = True

        self._draining = asyncio.ensure_future(drained())
