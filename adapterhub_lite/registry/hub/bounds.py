"""What a hub may send us: so many bytes, in so much time, in so many answers, and the token to the hub's host alone.

`huggingface_hub` sends everything through one client of the process. Two hooks on that client look whether an operation
of ours runs in this context, and leave all other requests as they are. A promise is a size that was listed before the
bytes came; where there is none, a named limit stands in.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import httpx2
from huggingface_hub import get_session

from adapterhub_lite.errors import HubError

ANSWER_BYTES = 32 << 20
MOST_REQUESTS = 400
# An answer may take this long, and longer by what it brings at the slowest rate that is waited for.
GRACE_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 10_000
SILENCE_SECONDS = 60.0
# What errors, redirects and a download's look-ups bring besides the file itself.
SLACK_BYTES = 1 << 20
SECRETS = ("authorization", "cookie")


@dataclass
class HubBounds:
    """What is left to one operation at `endpoint`. Counts decoded bytes too, which may be far more than came."""

    doing: str
    endpoint: str
    limit: int = ANSWER_BYTES
    requests: int = MOST_REQUESTS
    own_host_only: bool = True
    clock: Callable[[], float] = time.monotonic
    received: int = 0
    decoded: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def receive(self, count: int) -> None:
        """Count bytes of the wire. Raises HubError when they are too many, or come too slowly."""
        self.received += count
        self._require(self.received <= self.limit, f"it sends more than {self.limit} bytes")
        patience = GRACE_SECONDS + self.received / SLOWEST_BYTES_PER_SECOND
        self._require(self.clock() - self.started <= patience, "it sends too slowly")

    def decode(self, count: int) -> None:
        """Count decoded bytes. Raises HubError when they are too many."""
        self.decoded += count
        self._require(self.decoded <= self.limit, f"it sends more than {self.limit} bytes, compressed")

    def before(self, request: httpx2.Request) -> None:
        """Look at a request before it is sent: its host, its number, how long it may stay without an answer."""
        self.requests -= 1
        self._require(self.requests >= 0, "it has more and more pages")
        if _origin(request.url) != _origin(httpx2.URL(self.endpoint)):
            self._require(not self.own_host_only, f"it points to another host, {request.url.host!r:.80}")
            for name in SECRETS:
                request.headers.pop(name, None)
        waits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: SILENCE_SECONDS if waits.get(kind) is None else waits[kind]
            for kind in ("connect", "read", "write", "pool")
        }

    def after(self, response: httpx2.Response) -> None:
        """Count what an answer brings, while it is read."""
        announced = response.headers.get("content-length", "")
        if response.request.method != "HEAD" and announced.isdigit():
            self._require(
                int(announced) <= self.limit, f"it announces {announced} bytes, at most {self.limit} are read"
            )
        response.stream = _Counted(response.stream, self.receive)  # type: ignore[arg-type] # sync, as the client is
        decoded = response.iter_bytes

        def counted(chunk_size: int | None = None) -> Iterator[bytes]:
            for chunk in decoded(chunk_size):
                self.decode(len(chunk))
                yield chunk

        response.iter_bytes = counted  # type: ignore[method-assign]

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            raise HubError(f"Could not {self.doing} at {self.endpoint}: {problem}. Do not trust this hub.")


class _Counted(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, count: Callable[[int], None]) -> None:
        self._stream, self._count = stream, count

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._count(len(chunk))
            yield chunk

    def close(self) -> None:
        self._stream.close()


_current: ContextVar[HubBounds | None] = ContextVar("hub_bounds", default=None)


@contextmanager
def bounded(bounds: HubBounds) -> Iterator[None]:
    """A block in which everything that `huggingface_hub` sends from this context keeps to `bounds`."""
    client = get_session()
    hooks = client.event_hooks
    # The client may be another one than at the last call: it is closed at a fork, and users may bring their own.
    if _before not in hooks["request"]:
        client.event_hooks = {"request": [*hooks["request"], _before], "response": [*hooks["response"], _after]}
    token = _current.set(bounds)
    try:
        yield
    finally:
        _current.reset(token)


def _before(request: httpx2.Request) -> None:
    bounds = _current.get()
    if bounds is not None:
        bounds.before(request)


def _after(response: httpx2.Response) -> None:
    bounds = _current.get()
    if bounds is not None:
        bounds.after(response)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
