"""A server in a process of its own, at the real limits: of memory, of connections, and at its end."""

import json
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub_lite.registry import AdapterRegistry
from tests.serving.api.served_process import served_process

pytestmark = pytest.mark.slow
ASK: dict[str, Any] = {"model": "base", "prompt": "x", "max_tokens": 2, "temperature": 0}
OPTIONS = ("--base-name", "base", "--max-prompt-characters", "200000")


@pytest.fixture(scope="module")
def long_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a context of 131,072 tokens."""
    folder = tmp_path_factory.mktemp("long") / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131_072}))
    return folder


def ask(url: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=ASK | changes, timeout=300)


def test_one_long_prompt_where_memory_is_short_ends_itself_and_nobody_else(long_base: Path, tmp_path: Path) -> None:
    with served_process(long_base, tmp_path / "home", tmp_path / "log", *OPTIONS) as server:
        expected = ask(server.url).json()["choices"]
        body = ASK | {"prompt": "z" * 300, "max_tokens": 400, "stream": True, "temperature": 1}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as neighbour:
            lines = neighbour.iter_lines()
            next(lines)  # it has its row and its memory
            server.allow(60_000_000)
            refused = ask(server.url, prompt="y" * 120_000)
            assert refused.status_code in (400, 503), refused.text
            assert "data: [DONE]" in list(lines)
        assert ask(server.url).json()["choices"] == expected
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/ready").status_code == 200
        assert server.process.poll() is None


def test_what_never_fits_the_cache_is_refused_with_the_figures(long_base: Path, tmp_path: Path) -> None:
    with served_process(long_base, tmp_path / "home", tmp_path / "log", *OPTIONS, "--cache-memory", "4MiB") as server:
        refused = ask(server.url, prompt="y" * 120_000)
        assert refused.status_code == 400
        assert "--cache-memory" in refused.text and "120," not in refused.json()["error"].get("code", "")
        assert ask(server.url).status_code == 200


def test_a_drain_can_be_seen_and_what_runs_is_finished(
    registry: AdapterRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    options = ("--drain-seconds", "20", "--base-name", "base")
    with served_process(tiny_base, registry.home, tmp_path / "log", *options) as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        body = ASK | {"max_tokens": 400, "stream": True, "temperature": 1, "stop": []}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/ready").status_code == 200:
                pass
            late = ask(server.url)
            assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert "data: [DONE]" in list(lines)
        server.process.send_signal(signal.SIGTERM)  # a second one: at once
        assert server.process.wait(timeout=60) == 0


def test_a_flood_before_any_key_costs_little_and_delays_nobody(tiny_base: Path, tmp_path: Path) -> None:
    with served_process(tiny_base, tmp_path / "home", tmp_path / "log", "--base-name", "base") as server:
        host, port = server.url.removeprefix("http://").split(":")
        expected, before = ask(server.url).json()["choices"], server.bytes_of("VmRSS")
        crowd = []
        try:
            for number in range(550):
                one = socket.create_connection((host, int(port)), timeout=30)
                if number < 50:
                    one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9999\r\n\r\n{")
                crowd.append(one)
            for _ in range(5):
                assert ask(server.url).json()["choices"] == expected
            assert server.bytes_of("VmHWM") - before < 64 << 20
        finally:
            for one in crowd:
                one.close()
