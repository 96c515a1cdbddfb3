"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}. Which of ours is which status."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapterhub_lite.errors import (
    AdapterHubError,
    AliasConflictError,
    EngineClosedError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    ServingError,
    UnknownNameError,
    UsageError,
)


class ApiRefusal(Exception):  # noqa: N818 - an HTTP status, never seen by a caller of the package
    """A refusal with its HTTP status and OpenAI's `code` and `param`."""

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None) -> None:
        self.status, self.code, self.param = status, code, param
        super().__init__(message)


# The first class that fits: (status, type, code).
_STATUS: tuple[tuple[type[AdapterHubError], tuple[int, str, str]], ...] = (
    (UnknownNameError, (404, "invalid_request_error", "model_not_found")),
    (UsageError, (400, "invalid_request_error", "invalid_value")),
    (AliasConflictError, (409, "invalid_request_error", "alias_conflict")),
    (QueueFullError, (429, "rate_limit_error", "queue_full")),
    (RequestTimeoutError, (408, "timeout_error", "timeout")),
    (RequestCancelledError, (499, "cancelled", "cancelled")),
    (EngineClosedError, (503, "server_error", "shutting_down")),
    (ServingError, (500, "server_error", "internal_error")),
    (AdapterHubError, (400, "invalid_request_error", "adapter_refused")),
)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """(status, body) of an error; one that is not of our tree tells nothing about the server's inside."""
    param: str | None = None
    if isinstance(error, ApiRefusal):
        status, code, param = error.status, error.code, error.param
        kind = _TYPES.get(status, "invalid_request_error")
    elif isinstance(error, AdapterHubError):
        status, kind, code = next(answer for family, answer in _STATUS if isinstance(error, family))
    else:
        status, kind, code = 500, "server_error", "internal_error"
    known = isinstance(error, (ApiRefusal, AdapterHubError)) and status != 500
    message = str(error) if known else "The server failed on this request; its log says why."
    # A message may quote what came in, which need not be encodable.
    clean = message.encode("utf-8", "replace").decode()
    return status, {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """The answer for an error; a full queue says when to come back."""
    status, body = error_body(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(body, status, headers)


def error_event(error: Exception) -> str:
    """The event that ends a stream which failed half-way."""
    return f"data: {json.dumps(error_body(error)[1])}\n\n"


async def _ours(request: Request, error: Exception) -> JSONResponse:
    request.state.failure = error
    return error_response(error)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or None
    text = f"{where or 'The body'}: {first['msg']}" + ("" if len(error.errors()) == 1 else " (and more)")
    return error_response(ApiRefusal(400, text, "invalid_request", param=where))


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, body = error_body(ApiRefusal(error.status_code, str(error.detail), "http_error"))
    return JSONResponse(body, status, error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` one of OpenAI's form."""
    app.add_exception_handler(ApiRefusal, _ours)
    app.add_exception_handler(AdapterHubError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _ours)
