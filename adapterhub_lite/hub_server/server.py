"""The hub on a loopback port, in a thread of this process."""

import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from adapterhub_lite import files
from adapterhub_lite.errors import ResourceError
from adapterhub_lite.hub_server.app import create_app
from adapterhub_lite.hub_server.faults import FaultLayer, Faults
from adapterhub_lite.hub_server.hub import Account
from adapterhub_lite.web.guard import BrowserGuard, ConnectionLimits, HeaderLimit
from adapterhub_lite.web.rates import RateLimit

# A part of 64 MB has an hour to arrive, and an answer may stay unread for a minute.
LIMITS = ConnectionLimits(body_seconds=3600, unread_seconds=60, idle_seconds=60)


class HubServer:
    """A context manager: `with HubServer(folder) as hub: HfApi(endpoint=hub.url)`.

    `port` 0 takes a free one. `tokens` maps tokens to accounts; None lets everybody read and write. Files above
    `part_bytes` are uploaded in parts; no repository may hold more than `quota_bytes` over all its commits.
    `hosts` are names under which a proxy serves it; requests to other names, and from pages of other sites, are refused.
    `requests_per_minute` is for each account, and for each address without a token; None is no limit.

    Raises:
        ResourceError: the port or the folder is in use.
    """

    def __init__(
        self,
        data: Path,
        *,
        port: int = 0,
        tokens: Mapping[str, Account] | None = None,
        part_bytes: int = 64_000_000,
        quota_bytes: int | None = None,
        hosts: Sequence[str] = (),
        requests_per_minute: int | None = None,
    ) -> None:
        self.faults, self._claim = Faults(), claim(data)
        # asyncio disables Nagle's algorithm only on sockets created as TCP; otherwise small answers wait 40 ms for an ACK.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
        except OSError as error:
            self._socket.close()
            self._claim()
            raise ResourceError(f"Port {port} on 127.0.0.1 is not free ({error.strerror}); pick another.") from error
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        layered = FaultLayer(
            create_app(data, tokens=tokens, part_bytes=part_bytes, quota_bytes=quota_bytes), self.faults
        )
        limited: ASGIApp = layered
        if requests_per_minute is not None:
            limited = RateLimit(layered, requests_per_minute, lambda scope: caller_of(scope, tokens or {}))
        # A page of another site in a browser on this machine must not reach the hub.
        guarded = BrowserGuard(HeaderLimit(limited, LIMITS), hosts=hosts)
        config = uvicorn.Config(
            guarded, log_level="critical", lifespan="off", timeout_graceful_shutdown=2, **LIMITS.uvicorn_options()
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> "HubServer":
        self._socket.listen(128)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._claim()


def caller_of(scope: Scope, tokens: Mapping[str, Account]) -> str:
    """Whom a request is counted for: the account of a known token, else the address that it came from."""
    token = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
    if token in tokens:
        return f"account {tokens[token].name}"
    return f"address {scope['client'][0] if scope.get('client') else ''}"


def claim(data: Path) -> Callable[[], None]:
    """Keep other hubs off the folder until what is returned is called: each would sweep the uploads of the other.

    Raises:
        ResourceError: another hub has it.
    """
    data.mkdir(parents=True, exist_ok=True)
    file = (data / "hub.lock").open("w")
    release = files.claim(file)
    if release is None:
        file.close()
        raise ResourceError(f"Another hub is running on {data}; stop it, or give another folder.")
    return release
