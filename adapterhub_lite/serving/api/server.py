"""The server as a process: listens, serves until told to stop, lets its requests finish, closes the engine."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import uvicorn

from adapterhub_lite.errors import ResourceError
from adapterhub_lite.serving.adapters.sources import AdapterStore
from adapterhub_lite.serving.api.app import create_api
from adapterhub_lite.serving.api.auth import Caller, KeyRing
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.observe import log_to_stderr
from adapterhub_lite.serving.api.settings import ServerSettings


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the server and nothing else: code after `run()` is still reached."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Mark the server as draining before it waits for the requests in work."""
        self._on_stop()
        await super().shutdown(sockets)


class ApiServer:
    """An engine on a port. `run()` serves in this thread until SIGTERM or SIGINT; a `with` block serves in another.

    Stopping drains: no new connections are taken, requests in work get `drain_seconds`, what is left then is cut off.

    Raises:
        ResourceError: the port is taken.
        AdapterHubError: an adapter to load at the start cannot be served.
    """

    def __init__(
        self, engine: Engine, registry: AdapterStore, settings: ServerSettings, keys: KeyRing | None = None
    ) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((settings.host, settings.port))
        except OSError as error:
            self._socket.close()
            raise ResourceError(
                f"{settings.host}:{settings.port} is not free to listen on ({error.strerror}); choose another --port."
            ) from error
        try:
            self.app = create_api(engine, registry, settings, keys)
            self.api = self.app.state.api
            for reference in settings.references:
                self.api.dispatcher.load(reference, Caller("start", admin=True))
        except BaseException:
            self._socket.close()
            raise
        self.url = f"http://{settings.host}:{self._socket.getsockname()[1]}"
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off"}
        config = uvicorn.Config(self.app, timeout_graceful_shutdown=settings.drain_seconds, **quiet)
        self._server = _Uvicorn(config, self._drain)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def _drain(self) -> None:
        self.api.draining = True

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, with the log on standard error; returns when everything has ended."""
        log_to_stderr()
        self._socket.listen(1024)
        try:
            self._server.run([self._socket])
        finally:
            self._close()

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
