"""The server as a process: listens, serves until it is told to stop, lets its requests finish, closes what it holds.

SIGTERM drains: for `drain_seconds` the server still listens, `/ready` says 503 so that a load balancer sees it, and new
work is refused with Retry-After; then it stops listening, and ends when the running requests have ended, each of which
has its own time limit. SIGINT (Ctrl+C) skips the wait for load balancers. A second signal ends at once. SIGHUP reads
the file of keys again.
"""

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import uvicorn

from adapterhub_lite.errors import EngineClosedError, ResourceError
from adapterhub_lite.serving.adapters.sources import AdapterStore
from adapterhub_lite.serving.api.app import Api, create_api
from adapterhub_lite.serving.api.auth import Caller, KeyRing
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.observe import log_to_stderr
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.web.guard import ConnectionLimits

# Time in which /health can be seen to say that the engine has ended, before the process ends too.
ENDED_SECONDS = 3.0


class _Uvicorn(uvicorn.Server):
    """uvicorn with the signals above, which also stops when the engine has ended."""

    def __init__(self, config: uvicorn.Config, api: Api) -> None:
        super().__init__(config)
        self._api = api
        self._loop: asyncio.AbstractEventLoop | None = None
        self.engine_ended = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals while serving, and nothing else: code after `run()` is still reached."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGINT: self.handle_exit, signal.SIGTERM: self.handle_exit}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = lambda *_: self._api.keys.refresh(forced=True)
        before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and learn of the engine's end."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._api.dispatcher.engine.when_ended(self._after_the_engine)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        if self._api.dispatcher.draining:
            self.should_exit = self.force_exit = True
            return
        self._api.dispatcher.draining = True
        self._stop_in(self._api.settings.drain_seconds if sig == signal.SIGTERM else 0)

    def _after_the_engine(self) -> None:
        self.engine_ended = True
        self._stop_in(ENDED_SECONDS)

    def _stop_in(self, seconds: float) -> None:
        """Stop listening after so many seconds. For any thread, and for signal handlers."""

        def stop() -> None:
            self.should_exit = True

        if self._loop is None:
            return stop()
        # The loop is closed when the server has stopped before its engine.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that nothing more is taken, then wait for the requests in work."""
        self._api.dispatcher.draining = True
        await super().shutdown(sockets)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; port 0 takes a free one.

    Raises:
        ResourceError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ResourceError(
            f"{host}:{port} is not free to listen on ({error.strerror}); choose another --port."
        ) from error
    return made


class ApiServer:
    """An engine on a port. `run()` serves in this thread until SIGTERM or SIGINT; a `with` block serves in another.

    Raises:
        ResourceError: the port is taken.
        AdapterHubError: an adapter to load at the start cannot be served.
    """

    def __init__(
        self, engine: Engine, registry: AdapterStore, settings: ServerSettings, keys: KeyRing | None = None
    ) -> None:
        self._socket = bound_socket(settings.host, settings.port)
        try:
            self.app = create_api(engine, registry, settings, keys)
            self.api: Api = self.app.state.api
            for reference in settings.references:
                self.api.dispatcher.load(reference, Caller("start", admin=True))
        except BaseException:
            self._socket.close()
            raise
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        limits = ConnectionLimits(
            first_byte_seconds=settings.header_seconds, header_seconds=settings.header_seconds,
            body_seconds=settings.body_seconds, idle_seconds=settings.idle_seconds,
            unread_seconds=settings.unread_seconds, connections=settings.max_connections,
            per_address=settings.max_connections_per_address,
        )  # fmt: skip
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, lifespan="off", proxy_headers=False, server_header=False,
            # What is left in work at a stop has its own limit of time; this is for what does not keep to it.
            timeout_graceful_shutdown=math.ceil(settings.timeout_seconds) + 5, **limits.uvicorn_options(),
        )  # fmt: skip
        self._server = _Uvicorn(config, self.api)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, with the log on standard error; returns when everything has ended.

        Raises:
            EngineClosedError: the engine ended by itself.
        """
        log_to_stderr()
        self._socket.listen(1024)
        try:
            self._server.run([self._socket])
        finally:
            self._close()
        if self._server.engine_ended:
            raise EngineClosedError("The engine ended and could not be restarted; the log has the reason.")

    def _close(self) -> None:
        self.api.dispatcher.close()
        self._socket.close()

    def __enter__(self) -> "ApiServer":
        self._socket.listen(1024)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._close()
