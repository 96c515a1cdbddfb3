"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}. Which of ours has which status.

4xx: the caller can do something about it, and the text says what. 5xx: the fault is ours, and the text says nothing of
paths or insides; the log has them, under the request id that the answer's X-Request-Id names.
"""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapterhub_lite.errors import (
    AdapterHubError,
    AdapterRejectedError,
    AliasConflictError,
    BaseMismatchError,
    EngineClosedError,
    EngineUnreachableError,
    HubError,
    HubUnreachableError,
    IntegrityError,
    QueueFullError,
    RegistryError,
    RequestCancelledError,
    RequestTimeoutError,
    ResourceError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.serving.api.wire.refusals import refusal


class ApiRefusal(Exception):  # noqa: N818 - an HTTP status, never seen by a caller of the package
    """A refusal with its HTTP status and OpenAI's `code` and `param`; `retry_after` in seconds."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        super().__init__(message)


LOGGED = "; its log has the reason under this request's id."
# The first class that fits: (status, type, code, the text for faults of ours; None tells the error's own).
_STATUS: tuple[tuple[type[AdapterHubError], tuple[int, str, str, str | None]], ...] = (
    (UnknownNameError, (404, "invalid_request_error", "model_not_found", None)),
    (UsageError, (400, "invalid_request_error", "invalid_value", None)),
    (AdapterRejectedError, (400, "invalid_request_error", "adapter_refused", None)),
    (BaseMismatchError, (400, "invalid_request_error", "adapter_refused", None)),
    (AliasConflictError, (409, "invalid_request_error", "alias_conflict", None)),
    (QueueFullError, (429, "rate_limit_error", "queue_full", None)),
    (RequestTimeoutError, (408, "timeout_error", "timeout", None)),
    (RequestCancelledError, (499, "cancelled", "cancelled", None)),
    (EngineUnreachableError, (503, "server_error", "engine_unreachable", None)),
    (EngineClosedError, (503, "server_error", "engine_closed", None)),
    (
        IntegrityError,
        (500, "server_error", "adapter_damaged", "The adapter's files are damaged on the server" + LOGGED),
    ),
    (HubUnreachableError, (503, "server_error", "hub_unreachable", "The server cannot reach its hub" + LOGGED)),
    (HubError, (502, "server_error", "hub_error", "The server's hub did not hand out the adapter" + LOGGED)),
    (RegistryError, (503, "server_error", "store_unavailable", "The server cannot read its registry" + LOGGED)),
    (ResourceError, (503, "server_error", "out_of_resources", "The server's machine refused" + LOGGED)),
)
_FAILED = (500, "server_error", "internal_error", "The server failed on this request" + LOGGED)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "server_error"}


def error_body(error: BaseException) -> tuple[int, dict[str, Any]]:
    """(status, body) of an error; one that is not of our tree tells nothing about the server's inside."""
    param: str | None = None
    text: str | None = None
    if isinstance(error, ApiRefusal):
        status, code, param = error.status, error.code, error.param
        kind = _TYPES.get(status, "invalid_request_error")
    else:
        status, kind, code, text = next((answer for family, answer in _STATUS if isinstance(error, family)), _FAILED)
    # A message may quote what came in, which need not be encodable.
    message = (text or str(error)).encode("utf-8", "replace").decode()
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: BaseException) -> JSONResponse:
    """The answer for an error; what may be tried again says when."""
    status, body = error_body(error)
    wait = getattr(error, "retry_after", None) or (1 if status in (429, 503) else None)
    headers = {"Retry-After": str(wait)} if wait else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(body, status, headers)


def refuse(status: int, text: str) -> JSONResponse:
    """The answer for what is refused before anything is looked up: a host, a header, a content type."""
    return error_response(ApiRefusal(status, text, "refused"))


def error_event(error: BaseException) -> str:
    """The event that ends a stream which failed in the middle."""
    return f"data: {json.dumps(error_body(error)[1])}\n\n"


async def _ours(request: Request, error: Exception) -> JSONResponse:
    request.state.failure = error
    return error_response(error)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    text, param = refusal(error.errors(), error.body)
    return error_response(ApiRefusal(400, text, "invalid_request", param=param))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # Of a route that is there, a handler's own refusal is told instead.
    told = {404: "does not exist on this server", 405: f"is not for {request.method}"}.get(error.status_code)
    text = str(error.detail) if told is None else f"{request.url.path[:200]} {told}; /docs lists what there is."
    status, body = error_body(ApiRefusal(error.status_code, text, "http_error"))
    return JSONResponse(body, status, error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` OpenAI's form. What is not of our tree is answered by the access log's middleware."""
    app.add_exception_handler(ApiRefusal, _ours)
    app.add_exception_handler(AdapterHubError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
