"""Connections that send nothing, too slowly or too much are closed, and cost the others nothing."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from adapterhub_lite.web.guard import ConnectionLimits, HeaderLimit

SHORT = {
    "header_bytes": 4096, "header_count": 20, "first_byte_seconds": 0.5, "header_seconds": 0.5, "body_seconds": 0.5,
    "idle_seconds": 1, "unread_seconds": 0.5, "connections": 40, "per_address": 30,
}  # fmt: skip


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def endless(_: Request) -> StreamingResponse:
    async def blocks() -> Any:
        while True:
            yield b"x" * 65_536
            await asyncio.sleep(0)  # for a client that has gone, nothing else waits

    return StreamingResponse(blocks())


class Served:
    """A server with limits on a port of its own."""

    def __init__(self, limits: ConnectionLimits) -> None:
        app = HeaderLimit(
            Starlette(routes=[Route("/", echo, methods=["GET", "POST"]), Route("/endless", endless)]), limits
        )
        config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", **limits.uvicorn_options())
        self.table = config.http.table  # type: ignore[union-attr]
        self.server = uvicorn.Server(config)
        self.socket = config.bind_socket()
        self.socket.listen(128)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()

    def connect(self, sent: bytes = b"") -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        opened.sendall(sent)
        return opened

    def ask(self) -> str:
        """A request's answer; asked again where a pause of the test itself, with its half a second, cost the connection."""
        for _ in range(20):
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                return httpx.get(f"http://127.0.0.1:{self.port}/", timeout=20).text
        raise AssertionError("twenty requests in a row got no answer")


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server with short limits, but for those that a test gives as its parameter."""
    one = Served(ConnectionLimits(**SHORT | getattr(request, "param", {})))
    yield one
    one.server.should_exit = one.server.force_exit = True
    one.thread.join()
    one.socket.close()


def ended(connection: socket.socket) -> bytes:
    """What came until the other side closed; a time-out of the socket is a failure."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(65_536):
            got += block
    return got


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200\r\n\r\n{",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b"G",
    ],
)  # fmt: skip
def test_what_is_never_finished_is_closed(served: Served, sent: bytes) -> None:
    with served.connect(sent) as connection:
        assert b" 200 " not in ended(connection)
    assert served.ask() == "0"


@pytest.mark.parametrize(
    "start", [b"GET / HTTP/1.1\r\nX-A: ", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"]
)
def test_a_byte_now_and_then_does_not_set_the_clock_back(served: Served, start: bytes) -> None:
    with served.connect(start) as connection:
        connection.settimeout(0.05)
        with pytest.raises(OSError, match=r"reset|closed|pipe|Broken"):
            while True:
                connection.sendall(b"a")
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1000):
                        raise ConnectionResetError("closed")


def test_headers_have_a_size_and_a_number(served: Served) -> None:
    with served.connect(b"GET / HTTP/1.1\r\nHost: x\r\n") as connection:
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                connection.sendall(b"X-A: " + b"a" * 1000 + b"\r\n")
        assert b" 200 " not in ended(connection)
    url = f"http://127.0.0.1:{served.port}/"
    assert httpx.get(url, headers={f"x-{i}": "a" for i in range(30)}).status_code == 431
    assert httpx.get(url, headers={"x-a": "a" * 5000}).status_code in (400, 431)
    assert httpx.get(url, params={"a": "a" * 5000}).status_code in (400, 431)


def test_a_client_that_leaves_its_answer_unread_is_let_go(served: Served) -> None:
    with served.connect(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        while not len(served.table):
            time.sleep(0.01)
        while len(served.table):
            assert connection.fileno() >= 0
            time.sleep(0.01)


# Only newcomers may end anything here, not a pause of the test.
PATIENT = {name: 60 for name in SHORT if name.endswith("_seconds")}
patient = pytest.mark.parametrize("served", [PATIENT], ids=["patient"], indirect=True)


@patient
def test_a_flood_of_idle_connections_makes_room_for_who_asks(served: Served) -> None:
    crowd = [served.connect() for _ in range(60)]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{served.port}") as client:
            for _ in range(5):
                assert client.get("/").text == "0"
                assert client.post("/", content=b"x" * 1000).text == "1000"
        assert len(served.table) <= SHORT["per_address"]
        assert served.table.dropped
    finally:
        for one in crowd:
            one.close()


@patient
def test_a_request_in_work_is_never_dropped_for_a_newcomer(served: Served) -> None:
    body = served.connect(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
    body.recv(1000)
    crowd = [served.connect() for _ in range(40)]
    try:
        assert served.ask() == "0"
        for _ in range(200):
            assert body.recv(65_536)
    finally:
        for one in (body, *crowd):
            one.close()
