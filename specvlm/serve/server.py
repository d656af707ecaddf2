"""Run the application: bounds on slow clients, one line for a port that is taken, and a shutdown that lets answers end."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from specvlm.errors import UserError
from specvlm.serve.app import App
from specvlm.serve.errors import bad
from specvlm.serve.settings import Settings

MOST_HEADERS = 2**16  # bytes
KEEP_ALIVE_S = 30
MORE_CONNECTIONS = 256  # beyond requests that run or wait


def bound(settings: Settings) -> socket.socket:
    """Take the port, before models are loaded. Raises UserError if that is not possible."""
    where = f"host={settings.host} port={settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"{where}: there is no such address here ({error.strerror})") from None
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
    """uvicorn's protocol, with a limit on the time that headers take, and errors in OpenAI's form."""

    header_timeout = 10.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._headers_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take data; wait for the rest of the headers if they are not complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._headers_late is None and not self.transport.is_closing():
            self._wait()

    def on_response_complete(self) -> None:
        """Wait for the next request, if its headers have begun already."""
        super().on_response_complete()
        self._stop()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        content = json.dumps(bad(f"this is no HTTP request: {msg}").body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request")
            for one in (response, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(one) or b"")
        self.transport.close()

    def _wait(self) -> None:
        self._headers_late = self.loop.call_later(self.header_timeout, self.transport.abort)

    def _stop(self) -> None:
        if self._headers_late is not None:
            self._headers_late.cancel()
            self._headers_late = None


class Server(uvicorn.Server):
    """uvicorn's server. The first signal to end lets requests end within a bound, and refuses new ones; the second ends it.

    Attributes:
        heard: Signals that came.
    """

    def __init__(self, app: App) -> None:
        settings = app.chat.settings
        protocol = type("BoundProtocol", (Protocol,), {"header_timeout": settings.header_timeout})
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
            limit_concurrency=settings.running + settings.queue + MORE_CONNECTIONS,
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let requests end at the first signal; end them at the second."""
        self.heard.append(sig)
        if len(self.heard) > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drained() -> None:
            await self._app.chat.drain()
            self.should_exit = True

        self._draining = asyncio.ensure_future(drained())
