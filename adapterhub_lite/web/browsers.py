"""What a browser may do with a server of ours: nothing that another site's page tells it to.

A page anywhere can make a visitor's browser send requests to 127.0.0.1, and with DNS rebinding (a name of the
attacker's that resolves to 127.0.0.1) read the answers too. So a request is refused unless

- its `Host` is an IP address, `localhost` or a name the server was told is its own: a rebound name is none of them;
- its `Origin`, if it has one, is this server itself or one of those names (`Sec-Fetch-Site` where there is no Origin);
- it has a content type that no HTML form can send, if it changes something and the server asks for that.

Every answer forbids framing by other sites (clickjacking). Sources: the Fetch standard on CORS-safelisted requests,
OWASP's cheat sheets on CSRF and clickjacking.
"""

import ipaddress
import json
from collections.abc import Callable, Collection, Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Refuse = Callable[[int, str], ASGIApp]
CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
DEFAULT_PORTS = (":80", ":443")


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
