"""Errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from specvlm.errors import line

BAD, TOO_LARGE, BUSY, DRAINING, FAULT = 400, 413, 429, 503, 500
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    405: "method_not_allowed_error",
    408: "timeout_error",
    BUSY: "rate_limit_error",
    FAULT: "server_error",
    DRAINING: "service_unavailable_error",
}  # all others: invalid_request_error
CLOSING = {"connection": "close"}  # the unread rest of a body would be taken for the next request


class ApiError(Exception):
    """An error that is sent as the answer to a request.

    Args:
        status: HTTP status.
        message: One line for the client.
        param: Name of the body's field that is wrong.
        code: Machine-readable code, such as "model_not_found".
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's JSON object."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": line(str(self)), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an answer."""
        return JSONResponse(self.body, self.status, self.headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make the error for an invalid request."""
    return ApiError(BAD, message, param=param, code=code)


def busy(message: str, seconds: int) -> ApiError:
    """Make the error for a request that finds no room. seconds: Time after which to retry."""
    return ApiError(BUSY, message, code="busy", headers={"retry-after": str(seconds)})
