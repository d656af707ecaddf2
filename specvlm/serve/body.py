"""Read the body of a request within bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.datastructures import Headers

from specvlm.serve.admission import Admission
from specvlm.serve.errors import CLOSING, TOO_LARGE, ApiError

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class Gone(Exception):
    """The client has closed the connection."""


class Body:
    """The body of a request. Its bytes count in `Admission` while it is held.

    Args:
        admission: Counts the bytes.
        most: Most bytes.
        seconds: Time in which it must arrive.
    """

    def __init__(self, admission: Admission, most: int, seconds: float) -> None:
        self._admission, self._most, self._seconds, self._held = admission, most, seconds, 0

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """Read the body. Raises ApiError as soon as it is too large or too slow; Gone if the client disconnects."""
        said = headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said[:20]) > self._most:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    if self._held + len(part) > self._most:
                        raise self._too_large()
                    self._admission.hold(len(part))
                    self._held += len(part)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._seconds:g} s", headers=CLOSING) from None
        except ApiError as error:
            error.headers |= CLOSING
            raise

    def release(self) -> None:
        """Stop counting the bytes."""
        self._admission.release(self._held)
        self._held = 0

    def _too_large(self) -> ApiError:
        return ApiError(TOO_LARGE, f"the body has more than {self._most:,} bytes", code="body_too_large", headers=CLOSING)
