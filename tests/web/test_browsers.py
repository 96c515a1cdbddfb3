"""Another site's page and a rebound name are refused; the server's own page, its names and programs are not."""

from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from adapterhub_lite.web.guard import BrowserGuard

JSON = {"content-type": "application/json"}


def client(**options: Any) -> TestClient:
    return TestClient(BrowserGuard(PlainTextResponse("fine"), **options), base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST:9", 200), ("[::1]:8000", 200), ("192.168.1.7", 200),
        ("own.example:8000", 200), ("Own.Example", 200), ("own.example.", 200), ("evil.example", 421),
        ("127.0.0.1.evil.example", 421), ("localhost.evil.example", 421), ("not-own.example", 421), ("", 421),
        ("evil.example:127.0.0.1", 421), ("[evil.example]", 421), ("127.0.0.1@evil.example", 421),
    ],
)  # fmt: skip
def test_a_host_is_an_address_or_the_servers_own(host: str, status: int) -> None:
    assert client(hosts=["own.example"]).get("/", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 200), ("own.example", "https://own.example", 200),
        ("127.0.0.1:8000", "https://own.example", 200),  # a proxy in front that gives its own Host
        ("own.example", "https://own.example:443", 200), ("127.0.0.1:8000", "http://127.0.0.1:9000", 403),
        ("127.0.0.1:8000", "http://localhost:8000", 403), ("127.0.0.1:8000", "https://evil.example", 403),
        ("127.0.0.1:8000", "null", 403), ("127.0.0.1:8000", "", 403), ("127.0.0.1:8000", "http://[", 403),
        ("own.example", "https://own.example.evil.example", 403), ("own.example", "https://own.example@evil.example", 403),
    ],
)  # fmt: skip
def test_an_origin_is_the_server_itself(host: str, origin: str, status: int) -> None:
    for method in ("GET", "POST"):
        got = client(hosts=["own.example"]).request(method, "/", headers={"host": host, "origin": origin})
        assert got.status_code == status, got.text


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ("POST", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", **JSON}, 403),
        ("POST", {"sec-fetch-site": "same-site", **JSON}, 403), ("POST", {"sec-fetch-site": "same-origin", **JSON}, 200),
        ("POST", {"sec-fetch-site": "none", **JSON}, 200), ("POST", JSON, 200),
        ("POST", {"content-type": "Application/JSON; charset=utf-8"}, 200), ("POST", {}, 415),
        ("POST", {"content-type": "text/plain"}, 415), ("PUT", {"content-type": "multipart/form-data"}, 415),
        ("DELETE", {"content-type": "application/x-www-form-urlencoded"}, 415), ("GET", {}, 200),
    ],
)  # fmt: skip
def test_what_a_form_or_an_image_can_send_is_refused(method: str, headers: dict[str, str], status: int) -> None:
    guarded = client(content_types=("application/json",))
    assert guarded.request(method, "/", headers=headers).status_code == status


def test_every_answer_forbids_frames_but_those_that_are_named() -> None:
    for headers in (client().get("/").headers, client().get("/", headers={"host": "evil.example"}).headers):
        assert headers["content-security-policy"] == "frame-ancestors 'none'"
        assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("DENY", "nosniff")
    named = client(frame_ancestors=["https://huggingface.co"]).get("/").headers
    assert named["content-security-policy"] == "frame-ancestors https://huggingface.co"
    assert "x-frame-options" not in named
