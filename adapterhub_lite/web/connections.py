"""What a connection may cost before anybody knows whose it is: bytes, seconds, and how many there are.

uvicorn bounds the time between two requests and, with h11, the bytes of a header that has not ended. This adds the time
to the first byte, to the whole header and to the whole body, the time a client may leave an answer unread, and the
number of connections in all and per address. A full table drops the connection that has waited longest without a
request in work, rather than refuse the newcomer: a flood of idle connections then only ever costs the flood.
"""

import asyncio
import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from adapterhub_lite.web.browsers import Refuse, plain_refusal

# Descriptors kept for files, sockets to a hub and the like.
SPARE_DESCRIPTORS = 128
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits per connection in bytes and seconds, and on the number of connections."""

    header_bytes: int = 32_768
    header_count: int = 100
    first_byte_seconds: float = 10.0
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 15.0
    unread_seconds: float = 30.0
    connections: int = 1000
    per_address: int = 500

    def uvicorn_options(self) -> dict[str, Any]:
        """The keyword arguments of `uvicorn.Config` that put these limits into force."""
        return {
            "http": guarded_protocol(self),
            "ws": "none",
            "h11_max_incomplete_event_size": self.header_bytes,
            # In whole seconds there.
            "timeout_keep_alive": max(1, round(self.idle_seconds)),
        }


class ConnectionTable:
    """The open connections of one server, by address, oldest first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._most = limits.connections
        with contextlib.suppress(ImportError):  # there is no such limit on Windows
            import resource

            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft != resource.RLIM_INFINITY:
                self._most = max(1, min(self._most, soft - SPARE_DESCRIPTORS))
        self._by_address: defaultdict[str, dict[GuardedProtocol, None]] = defaultdict(dict)
        self.dropped = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_address.values()))

    def add(self, connection: "GuardedProtocol") -> None:
        """Count a connection; where there are too many, drop the one that has waited longest, or this one."""
        own = self._by_address[connection.address]
        own[connection] = None
        if len(own) > self.limits.per_address:
            crowd = own
        elif len(self) > self._most:
            crowd = max(self._by_address.values(), key=len)
        else:
            return
        waiting = (one for one in crowd if one.waiting and one is not connection)
        self.dropped += 1
        next(waiting, connection).drop()

    def remove(self, connection: "GuardedProtocol") -> None:
        """Forget a connection."""
        own = self._by_address.get(connection.address, {})
        own.pop(connection, None)
        if not own:
            self._by_address.pop(connection.address, None)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with deadlines. `table` is set in the subclass of each server."""

    table: ConnectionTable

    # uvicorn's own arguments, handed through.
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.address = ""
        self._phase = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """Whether no request of this connection is in work."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Count the connection, and expect its first byte."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._expect("first byte", self.table.limits.first_byte_seconds)
        self.table.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._expect("nothing", None)
        self.resume_writing()
        self.table.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in bytes, and expect the rest of what they belong to."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._expect("body", self.table.limits.body_seconds)
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect("header", self.table.limits.header_seconds)
        else:
            self._expect("nothing", None)

    def pause_writing(self) -> None:
        """Give the client some time to read what it was sent."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.table.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def drop(self) -> None:
        """Close the connection at once; a request in work counts as one whose client has gone."""
        if self.conn.our_state is h11.IDLE and self._phase in ("header", "body"):
            self.transport.write(TIMED_OUT)
        self.transport.close()
        # A client that never reads would keep a closing transport open.
        self.loop.call_later(1.0, self.transport.abort)

    def _expect(self, phase: str, seconds: float | None) -> None:
        """Start the clock of a phase, once: more bytes of the same phase don't set it back."""
        if phase == self._phase:
            return
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.drop)


def guarded_protocol(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """A protocol class with a table of connections of its own, for `uvicorn.Config(http=...)`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"table": ConnectionTable(limits)})


class HeaderLimit:
    """ASGI middleware that refuses a request with too many or too large headers, which came in one piece."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits, refuse: Refuse = plain_refusal) -> None:
        self.app, self.limits, self._refuse = app, limits, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request with 431, or hand it on."""
        headers = scope.get("headers", ())
        size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path") or b"")
        size += len(scope.get("query_string", b""))
        if scope["type"] == "http" and (len(headers) > self.limits.header_count or size > self.limits.header_bytes):
            text = f"At most {self.limits.header_count} headers of {self.limits.header_bytes} bytes in all are read."
            return await self._refuse(431, text)(scope, receive, send)
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses a body above `limit` bytes, before it is read when its length is announced, else as it arrives."""

    def __init__(self, app: ASGIApp, limit: int, refuse: Refuse = plain_refusal) -> None:
        self.app, self.limit, self._refuse = app, limit, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request with a counted body."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        text = f"The body is larger than {self.limit} bytes."
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > self.limit:
            return await self._refuse(413, text)(scope, receive, send)
        read = 0

        async def counted_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                # The framework lets this one class through while it reads a body.
                raise HTTPException(413, text)
            return message

        await self.app(scope, counted_receive, send)
