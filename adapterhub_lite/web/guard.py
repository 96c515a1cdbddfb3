"""What every server of ours checks before it trusts a browser or a connection.

Browsers: a page anywhere can make a visitor's browser send requests to 127.0.0.1, and with DNS rebinding (a name of the
attacker's that resolves to 127.0.0.1) read the answers too. So a request is refused unless

- its `Host` is an IP address, `localhost` or a name the server was told is its own: a rebound name is none of them;
- its `Origin`, if it has one, is this server itself or one of those names (`Sec-Fetch-Site` where there is no Origin);
- it has a content type that no HTML form can send, if it changes something and the server asks for that.

Every answer forbids framing by other sites (clickjacking). Sources: the Fetch standard on CORS-safelisted requests,
OWASP's cheat sheets on CSRF and clickjacking.

Connections: what one may cost in bytes and seconds, and how many there are. uvicorn bounds the time between two
requests and, with h11, the bytes of a header that has not ended. This adds the time to the first byte, to the whole
header and to the whole body, the time a client may leave an answer unread, and the number of connections in all and per
address. A full table drops the connection that has waited longest without a request in work, rather than refuse the
newcomer: a flood of idle connections then only ever costs the flood.
"""

import asyncio
import contextlib
import ipaddress
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

Refuse = Callable[[int, str], ASGIApp]
CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
DEFAULT_PORTS = (":80", ":443")
# Descriptors kept for files, sockets to a hub and the like.
SPARE_DESCRIPTORS = 128
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BrowserGuard:
    """ASGI middleware with the checks above. Plain ASGI, so that streams pass through unbuffered.

    Args:
        app: The application to protect.
        hosts: Names that are this server's own, without port, besides IP addresses and localhost.
        frame_ancestors: Origins that may show the server's pages in a frame; none by default.
        content_types: Of requests that change something, the content types that are taken; None takes every one.
        refuse: (status, text) -> the answer, for servers with an error format of their own.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str] = (),
        frame_ancestors: Iterable[str] = (),
        content_types: Collection[str] | None = None,
        refuse: Refuse | None = None,
    ) -> None:
        self.app = app
        self._hosts = frozenset(host.strip().lower() for host in hosts if host.strip())
        self._content_types = content_types
        self._refuse = refuse or plain_refusal
        parents = [parent.strip() for parent in frame_ancestors if parent.strip()]
        self._headers = [
            (b"content-security-policy", ("frame-ancestors " + " ".join(parents or ["'none'"])).encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if not parents:
            self._headers.append((b"x-frame-options", b"DENY"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or hand it on, and add the headers to its answer."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        problem = self.problem(scope)
        if problem is None:
            return await self.app(scope, receive, send_with_headers)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": problem[1][:120]})
        await self._refuse(*problem)(scope, receive, send_with_headers)

    def problem(self, scope: Scope) -> tuple[int, str] | None:
        """(status, reason) for which a request is refused; None for one that is fine."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = _name(host)
        if not (name == "localhost" or _is_address(name) or name in self._hosts):
            return 421, f"This server is not {name[:100]!r}. Its operator can add the name to its allowed hosts."
        origin = headers.get(b"origin")
        method = scope.get("method", "GET")
        if origin is not None:
            if not self._is_own(origin.decode("latin-1").lower(), host):
                return (
                    403,
                    "A page of another site sent this request, so it is refused (its Origin is not this server).",
                )
        # Without an Origin: a link that somebody follows is fine; an image, a script or a form is not.
        elif headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin") and (
            method != "GET" or headers.get(b"sec-fetch-mode") != b"navigate"
        ):
            return 403, "A page of another site sent this request, so it is refused (see Sec-Fetch-Site)."
        if self._content_types is not None and method in CHANGING:
            kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
            if kind not in self._content_types:
                return 415, f"The content type is {kind or 'missing'}; send {' or '.join(sorted(self._content_types))}."
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            address = urlsplit(origin)
            name = address.hostname or ""
        except ValueError:
            return False
        return name in self._hosts or (bool(name) and _without_port(address.netloc) == _without_port(host))


def plain_refusal(status: int, text: str) -> ASGIApp:
    """The answer {"error": text} with a status."""
    body = json.dumps({"error": text}).encode()

    async def answer(_: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    """A host without a default port, as TLS in front of the server leaves it out or puts it in."""
    return next((host.removesuffix(port) for port in DEFAULT_PORTS if host.endswith(port)), host)


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
