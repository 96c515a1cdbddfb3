"""A hub without end: every body, listing and promise stops at a limit, and the token goes to the hub alone."""

import gzip
import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from adapterhub_lite.errors import AdapterHubError, HubError, IntegrityError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import MOST_REQUESTS, HubBounds

SHA = "a" * 40


class Hub(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Answers as a test wants it; `seen` are the (path, authorization) of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, str | None]] = []
        self.sent = 0
        self.tree: list[dict[str, Any]] = []
        self.link: str | None = None
        self.body: bytes | None = b"{}"
        self.encoding: str | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what is wanted."""


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("authorization")))
        if "/resolve/" in self.path:
            return self._file()
        if "/refs" in self.path:
            refs = [{"name": "v1", "ref": "refs/tags/v1", "targetCommit": SHA}]
            return self._json({"branches": [], "tags": refs, "converts": []})
        if "/tree/" in self.path:
            return self._json(self.server.tree, self.server.link)
        self._json({"id": "org/x", "sha": SHA, "private": False, "siblings": []})

    def _json(self, content: Any, link: str | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        if link:
            self.send_header("link", f'<{link}>; rel="next"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _file(self) -> None:
        self.send_response(200)
        self.send_header("x-repo-commit", SHA)
        self.send_header("etag", '"' + "c" * 40 + '"')
        if self.server.encoding:
            self.send_header("content-encoding", self.server.encoding)
        if self.server.body is not None:
            self.send_header("content-length", str(len(self.server.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.body is not None:
            self.wfile.write(self.server.body)
            return
        while True:  # until the client hangs up
            self.wfile.write(b"x" * 100_000)
            self.server.sent += 100_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    one = Hub()
    one.tree = [{"type": "file", "oid": "b" * 40, "size": 1000, "path": "adapterhub.json"}]
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def third() -> Iterator[Hub]:
    one = Hub()
    yield one
    one.shutdown()
    one.server_close()


def pull(hub: Hub, registry: AdapterRegistry, revision: str | None = None) -> AdapterHubError:
    with pytest.raises(AdapterHubError) as refused:
        registry.pull("org/x", endpoint=hub.url, token="hf_secret", revision=revision)
    assert not [path for path in (registry.home / "objects").rglob("*") if path.is_file()]
    return refused.value


def test_a_file_without_end_stops_at_what_was_promised(hub: Hub, registry: AdapterRegistry) -> None:
    hub.body = None
    assert "sends more than" in str(pull(hub, registry))
    # What the buffers of the socket take is sent, but not read.
    assert hub.sent < 20_000_000
    assert sum(path.stat().st_size for path in registry.home.rglob("*") if path.is_file()) < 4_000_000


def test_a_small_file_that_unpacks_to_a_large_one(hub: Hub, registry: AdapterRegistry) -> None:
    hub.body, hub.encoding = gzip.compress(b" " * 200_000_000, 9), "gzip"
    assert "compressed" in str(pull(hub, registry))


def test_aliases_without_end_and_without_bottom(hub: Hub, registry: AdapterRegistry) -> None:
    hub.tree.append({"type": "file", "oid": "b" * 40, "size": 10, "path": "aliases.json"})
    hub.body = None
    assert isinstance(pull(hub, registry, "@prod"), HubError)
    for body in (b"[" * 200_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"prod": -1}', b'{"prod": 1e5}'):
        hub.body = body
        pull(hub, registry, "@prod")
    hub.body = b"[" * 200_000
    assert isinstance(pull(hub, registry, "@prod"), IntegrityError)


def test_pages_without_end(hub: Hub, registry: AdapterRegistry) -> None:
    hub.link = f"{hub.url}/api/models/org/x/tree/{SHA}?recursive=true&cursor=more"
    hub.tree = hub.tree * 10
    assert "more and more pages" in str(pull(hub, registry))
    assert len(hub.seen) <= MOST_REQUESTS + 20


@pytest.mark.parametrize("path", ["/next?x", "/api/models/org/x/tree/main"])
def test_the_next_page_at_another_host_is_not_asked_for(
    hub: Hub, third: Hub, registry: AdapterRegistry, path: str
) -> None:
    for elsewhere in (third.url, third.url.replace("127.0.0.1", "localhost")):
        hub.link = elsewhere + path
        assert "another host" in str(pull(hub, registry))
    assert not third.seen
    assert {token for _, token in hub.seen} == {"Bearer hf_secret"}


def test_an_answer_of_the_api_is_bounded(hub: Hub, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.registry.hub.client.ANSWER_BYTES", 1000)
    hub.tree = hub.tree * 100
    assert "announces" in str(pull(hub, registry))


def test_bytes_that_drip_are_not_waited_for() -> None:
    seconds = [0.0]
    counted = HubBounds("x", "http://hub.example", clock=lambda: seconds[0])
    for _ in range(59):
        seconds[0] += 1
        counted.receive(1)
    seconds[0] += 2
    with pytest.raises(HubError, match="too slowly"):
        counted.receive(1)


def test_other_users_of_the_client_are_left_alone(hub: Hub, registry: AdapterRegistry) -> None:
    from huggingface_hub import get_session

    pull(hub, registry)
    hub.body = b"x" * 5_000_000
    got: httpx2.Response = get_session().get(f"{hub.url}/org/x/resolve/main/big")
    assert len(got.content) == 5_000_000
