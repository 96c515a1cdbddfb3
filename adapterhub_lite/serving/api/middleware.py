"""Around every request: an id, a limit on its body, one line of JSON in the log, a count. Never a prompt or a key."""

import json
import logging
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_lite.serving.api.errors import ApiRefusal, error_response
from adapterhub_lite.serving.api.metrics import BASE, Metrics

logger = logging.getLogger("adapterhub.access")


def log_to_stderr() -> None:
    """Write the access log to standard error, unless the process has set it up otherwise."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class BodyLimit:
    """Refuses a body above `limit` bytes, before it is read when its length is announced, else as it arrives."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request with a counted body."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = f"The body is larger than {self.limit} bytes."
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.limit:
            return await error_response(ApiRefusal(413, told, "body_too_large"))(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                # The framework lets this one class through while it reads a body.
                raise HTTPException(413, told)
            return message

        await self.app(scope, counted, send)


class AccessLog:
    """Gives each request an id, logs and counts it when it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, new_id: Callable[[], str]) -> None:
        self.app, self.metrics, self.new_id = app, metrics, new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and tell of it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state, started, status = scope.setdefault("state", {}), time.perf_counter(), 499
        state["id"] = self.new_id()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["id"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self._tell(scope, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "none")
        adapter = state.get("adapter") or BASE
        self.metrics.requests.labels(route, str(status), adapter).inc()
        failure = state.get("failure")
        line = {"request_id": state["id"], "method": scope["method"], "route": route, "status": status,
                "seconds": round(seconds, 6), "caller": state.get("caller"), "adapter": adapter,
                "usage": state.get("usage"), "error": type(failure).__name__ if failure else None}  # fmt: skip
        logger.info(json.dumps(line))
