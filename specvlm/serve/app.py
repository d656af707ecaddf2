"""The server's application: its paths, API keys, and errors in OpenAI's form."""

from __future__ import annotations

import re
import sys
import time
import traceback
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from specvlm.serve.body import Message, Receive, Send
from specvlm.serve.errors import DRAINING, FAULT, ApiError
from specvlm.serve.metrics import TYPE
from specvlm.serve.settings import Keys, Settings
from specvlm.video.clips import FOLDER, names

PAGE = Path(__file__).parent / "page"
SHARED = ("specvlm.results", "page")  # page files shared with the report
GUARDED = ("/v1/", "/specvlm/")  # paths that need a key, if there are keys
LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
SAFE = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", POLICY.encode())]


class Answering(Protocol):
    """Endpoint of chat completions: a session in this process, or replicas in other processes.

    Attributes:
        settings: Settings of the server.
        model: Name of the model.
        draining: Whether new requests are refused, since the server is shutting down.
    """

    model: str

    @property
    def settings(self) -> Settings: ...

    @property
    def draining(self) -> bool: ...

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a chat completion, as an ASGI application."""

    async def defaults(self) -> dict[str, Any]:
        """Return the default options of requests."""

    async def view(self, name: str) -> dict[str, Any] | None:
        """Return what the drafter saw for an answer, by the answer's id; None if it is not, or no longer, kept."""

    async def numbers(self) -> bytes:
        """Return all metrics in Prometheus's text format."""

    async def is_ready(self) -> bool:
        """Whether requests can be answered now: the session or any replica runs."""

    async def drain(self) -> None:
        """Refuse new requests and wait until the others have ended.

        Those that have not after `shutdown_timeout` are ended with an error.
        """


class App:
    """The server's ASGI application.

    A server that listens on localhost answers only to local host names. Paths in GUARDED need an API key, if there are
    keys; `/health`, `/metrics` and the page never do.

    Args:
        chat: The endpoint of chat completions.
        keys: API keys.
    """

    def __init__(self, chat: Answering, keys: Keys) -> None:
        self.chat = chat
        self._keys, self._local, self._created = keys, _is_local(chat.settings.host), int(time.time())
        v1 = [
            Route("/chat/completions", _Endpoint(self.chat), methods=["POST"]),
            Route("/models", self._models, methods=["GET"]),
            Route("/models/{name:path}", self._model, methods=["GET"]),
        ]
        own = [
            Route("/info", self._info, methods=["GET"]),
            Route("/views/{name}", self._view, methods=["GET"]),
            Route("/clips/{name}", self._clip, methods=["GET"]),
        ]
        routes = [
            Mount("/v1", routes=v1),  # mounted, or the page's folder would answer for their other methods
            Mount("/specvlm", routes=own),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Mount("/", StaticFiles(directory=PAGE, packages=[SHARED], html=True)),
        ]
        handlers: dict[Any, Any] = {HTTPException: _error_answer, ApiError: _error_answer, Exception: _internal_error}
        self._inner = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Check host and key, then answer."""
        if scope["type"] == "http" and (error := self._refused(scope)):
            await error.response()(scope, receive, send)
            return

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SAFE]
            await send(message)

        await self._inner(scope, receive, safe)

    def _refused(self, scope: Message) -> ApiError | None:
        """Return the error if the request is refused, else None.

        A server on localhost answers only to its local names. Otherwise a web page could reach it through a name of its
        own (DNS rebinding).
        """
        headers = Headers(scope=scope)
        host = re.sub(r":\d+$", "", headers.get("host", "localhost").lower())
        if self._local and host not in LOCAL:
            return ApiError(403, "this server answers only localhost: give host=0.0.0.0 for other names", code="host_refused")
        if scope["path"].startswith(GUARDED) and not self._keys.allow(headers.get("authorization")):
            told = "no valid API key: send the header Authorization: Bearer KEY"
            return ApiError(401, told, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return None

    def _card(self) -> dict[str, Any]:
        return {"id": self.chat.model, "object": "model", "created": self._created, "owned_by": "specvlm"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.chat.model:
            raise ApiError(404, "this model does not exist", param="model", code="model_not_found")
        return JSONResponse(self._card())

    async def _view(self, request: Request) -> Response:
        if (view := await self.chat.view(request.path_params["name"])) is None:
            raise ApiError(404, "there is no view of this answer, or no longer: ask with specvlm.explain", code="no_view")
        return JSONResponse(view, headers={"cache-control": "no-store"})

    async def _clip(self, request: Request) -> Response:
        if (name := request.path_params["name"]) not in names():
            raise ApiError(404, f"there is no such clip; choose from {', '.join(names())}", code="no_such_file")
        return FileResponse(FOLDER / f"{name}.mp4", media_type="video/mp4")

    async def _info(self, request: Request) -> Response:
        limits = {key: getattr(self.chat.settings, key) for key in ("max_body_mib", "max_media", "max_frames", "fetch")}
        told = {"model": self.chat.model, "clips": names(), "limits": limits, "defaults": await self.chat.defaults()}
        return JSONResponse(told)

    async def _health(self, request: Request) -> Response:
        if self.chat.draining:
            raise ApiError(DRAINING, "the server is shutting down", code="shutting_down")
        if not await self.chat.is_ready():
            raise ApiError(DRAINING, "no replica runs now", code="no_replica", headers={"retry-after": "5"})
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(await self.chat.numbers(), media_type=TYPE)


class _Endpoint:
    """An ASGI application as an endpoint of a route. It is a class, since Starlette calls functions with a request."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _error_answer(request: Request, error: Any) -> Response:
    """Answer with an error in OpenAI's form."""
    if isinstance(error, ApiError):
        return error.response()
    what = {404: "there is nothing at this path", 405: f"{request.method} is not allowed here"}.get(error.status_code)
    return ApiError(error.status_code, what or str(error.detail), headers=error.headers).response()


async def _internal_error(request: Request, error: Exception) -> Response:
    """Print an unexpected error of the server and answer with status 500."""
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(FAULT, f"internal server error ({type(error).__name__})", code="server_error").response()
