"""Injected faults: what a network and a busy hub do to a client. Knows requests, not what they mean."""

import asyncio
import re
import threading
from dataclasses import dataclass
from typing import Literal, get_args

from starlette.types import ASGIApp, Message, Receive, Scope, Send

FaultKind = Literal["503", "429", "lost_response", "slow", "cut", "wrong_etag", "flipped_byte", "stale_listing"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
# Bounds the log of a hub that runs for weeks.
LOGGED_EXCHANGES = 100_000


@dataclass
class Fault:
    """Strike the next `times` requests of `method` ("" for any) whose path `path` matches somewhere.

    503 and 429 answer instead of the hub (429 asks for `seconds` of rest); lost_response lets the hub do its work and
    then drops the connection; slow waits `seconds` first; cut stops half-way through the body; wrong_etag and
    flipped_byte falsify one download; stale_listing shows branches as they were one commit ago.
    """

    kind: FaultKind
    path: str = ""
    method: str = ""
    times: int = 1
    seconds: float = 0


@dataclass(frozen=True)
class Exchange:
    """One request that the hub has seen; sizes are bytes of body. `fault` is "" when none struck."""

    method: str
    path: str
    status: int
    received: int
    sent: int
    fault: str


class Faults:
    """The rules in force, and a log of the latest exchanges. Thread-safe."""

    def __init__(self) -> None:
        self._rules: list[Fault] = []
        self._lock = threading.Lock()
        self.log: list[Exchange] = []

    def add(self, kind: FaultKind, path: str = "", *, method: str = "", times: int = 1, seconds: float = 0) -> Fault:
        """Put a rule in force; its `times` counts down to 0 as it strikes."""
        rule = Fault(kind, path, method, times, seconds)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Lift every rule and empty the log."""
        with self._lock:
            self._rules.clear()
            self.log.clear()

    def strike(self, method: str, path: str) -> Fault | None:
        """The rule that hits this request, counted; None for most."""
        with self._lock:
            for rule in self._rules:
                if rule.times > 0 and rule.method in ("", method) and re.search(rule.path, path):
                    rule.times -= 1
                    return rule
        return None


class FaultLayer:
    """Wraps the hub's application: strikes and logs."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self.app, self.faults = app, faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, with the fault that is in force for it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        rule = self.faults.strike(scope["method"], scope["path"])
        kind = rule.kind if rule else ""
        counts = {"status": 0, "received": 0, "sent": 0}

        async def counted_receive() -> Message:
            message = await receive()
            counts["received"] += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            counts["status"] = message.get("status", counts["status"])
            counts["sent"] += len(message.get("body", b""))
            await send(message)

        try:
            if rule and kind == "slow":
                await asyncio.sleep(rule.seconds)
            if rule and kind in ("503", "429"):
                limit = [
                    (b"ratelimit", f'"api";r=0;t={rule.seconds:g}'.encode()),
                    (b"retry-after", f"{rule.seconds:g}".encode()),
                ]
                headers = limit if kind == "429" else []
                await counted_send({"type": "http.response.start", "status": int(kind), "headers": headers})
                await counted_send({"type": "http.response.body", "body": b""})
            else:
                scope.setdefault("state", {})["stale"] = kind == "stale_listing"
                await self.app(scope, counted_receive, falsify(kind, counted_send))
        finally:
            self.faults.log.append(Exchange(scope["method"], scope["path"], **counts, fault=kind))
            del self.faults.log[:-LOGGED_EXCHANGES]


def falsify(kind: str, send: Send) -> Send:
    """Return a `send` that corrupts the answer as `kind` says; uvicorn drops the connection of an unfinished answer."""
    spoilt = False

    async def spoil(message: Message) -> None:
        nonlocal spoilt
        body, starts = message.get("body", b""), message["type"] == "http.response.start"
        if starts and kind == "lost_response":
            message = {**message, "headers": [(b"content-length", b"1")]}
        elif starts and kind == "wrong_etag":
            kept = [(key, value) for key, value in message["headers"] if key.lower() != b"etag"]
            message = {**message, "headers": [*kept, (b"etag", b'"' + b"0" * 40 + b'"')]}
        elif kind == "lost_response" or (kind == "cut" and spoilt):
            return
        elif body and not spoilt and kind in ("cut", "flipped_byte"):
            spoilt, middle = True, len(body) // 2
            rest = b"" if kind == "cut" else bytes([body[middle] ^ 1]) + body[middle + 1 :]
            message = {**message, "body": body[:middle] + rest, "more_body": kind == "cut" or message.get("more_body")}
        await send(message)

    return spoil if kind in ("lost_response", "cut", "wrong_etag", "flipped_byte") else send
