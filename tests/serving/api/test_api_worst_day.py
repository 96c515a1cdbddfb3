"""The worst day, in small: clients that vanish, abort, lie and race, and every answer still the right one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.server import ApiServer
from tests.serving.api.served_process import served_process

Serve = Callable[..., tuple[ApiServer, openai.OpenAI]]
MODELS = ("base", "sql:1", "sql:2", "event", "sql:1*0.5+event*2")
PROMPTS = ("one", "select the", "a longer prompt than the others, by some", "x" * 60)
LENGTHS = (3, 12)


def idle(server: ApiServer) -> bool:
    """Wait until nothing is in work; the server itself says so."""
    return any("adapterhub_prompts_in_work 0.0" in httpx.get(f"{server.url}/metrics").text for _ in range(2000))


@pytest.fixture(scope="session")
def truth(
    alone: Any, byte_tokenizer: Any, adapters: dict[str, Path], registry: AdapterRegistry
) -> dict[tuple[str, str, int], tuple[str | None, str]]:
    """(model, prompt, tokens) -> the digest that must answer, and the answer that plain PEFT gives to it alone."""
    folders = {"sql:1": adapters["small"], "sql:2": adapters["wide"], "event": adapters["mlp"]}
    found: dict[tuple[str, str, int], tuple[str | None, str]] = {}
    for model in MODELS:
        pieces = [] if model == "base" else [piece.partition("*") for piece in model.split("+")]
        parts = [(folders[name], float(weight or 1)) for name, _, weight in pieces]
        digests = [
            registry.resolve(name).digest + (f"*{float(weight)}" if weight else "") for name, _, weight in pieces
        ]
        for prompt in PROMPTS:
            tokens = alone.tokens(prompt, *parts, new=max(LENGTHS))
            for length in LENGTHS:
                text = byte_tokenizer.decode(tokens[:length], skip_special_tokens=True)
                found[model, prompt, length] = ("+".join(digests) or None, text)
    return found


def storm(
    serve: Serve, registry: AdapterRegistry, engine: InferenceEngine, truth: Any, clients: int, requests: int
) -> None:
    """Random models, prompts, lengths, aborts and alias moves; each answer equals its solo answer."""
    versions = {registry.resolve(f"sql:{n}").digest: f"sql:{n}" for n in (1, 2)}
    before = engine.base_digest()
    # An aborted one counts until the server has closed it, when its client may have sent the next.
    server, _ = serve(max_concurrent=2 * clients)

    def one(seed: int) -> str:
        dice = random.Random(seed)
        body: dict[str, Any] = {"prompt": dice.choice(PROMPTS), "max_tokens": dice.choice(LENGTHS), "temperature": 0}
        body["model"] = dice.choice((*MODELS, "sql@moving"))
        fate = dice.choice(("whole", "whole", "stream", "abort", "move"))
        if fate == "move":
            registry.set_alias("sql", "moving", version=dice.choice((1, 2)))
        if fate == "abort":
            with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as got:
                next(got.iter_lines())
            return fate
        text, receipt = ask(server, body, stream=fate == "stream")
        model = body["model"]
        if model == "sql@moving":
            model = versions[receipt["adapter_digest"]]
        assert (receipt["adapter_digest"], text) == truth[model, body["prompt"], body["max_tokens"]], (body, receipt)
        return fate

    registry.set_alias("sql", "moving", version=1)
    try:
        with ThreadPoolExecutor(clients) as pool:
            fates = list(pool.map(one, range(requests)))
    finally:
        registry.remove_alias("sql", "moving")
    assert set(fates) == {"whole", "stream", "abort", "move"}
    assert idle(server), "an aborted request is still in work"
    assert engine.base_digest() == before


def ask(server: ApiServer, body: dict[str, Any], *, stream: bool) -> tuple[str, dict[str, Any]]:
    """(text, receipt) of an answer that must come."""
    if not stream:
        got = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert got.status_code == 200, got.text
        return got.json()["choices"][0]["text"], got.json()["receipt"]
    text, receipt = "", {}
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=120) as got:
        for line in got.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text, receipt = text + event["choices"][0]["text"], event["receipt"]
    return text, receipt


@pytest.mark.parametrize(
    ("clients", "requests"),
    [(16, 150), pytest.param(64, 600, marks=pytest.mark.slow), pytest.param(64, 3000, marks=pytest.mark.soak)],
)
def test_a_storm(
    serve: Serve, registry: AdapterRegistry, shared_engine: InferenceEngine, truth: Any, clients: int, requests: int
) -> None:
    storm(serve, registry, shared_engine, truth, clients, requests)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [20, pytest.param(600, marks=pytest.mark.soak)])
def test_a_long_storm_on_a_process(
    registry: AdapterRegistry, tiny_base: Path, truth: Any, tmp_path: Path, seconds: int
) -> None:
    """64 clients: answers, streams, aborts, long prompts, floods, unloads and reloads. Memory stays what it was."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": {f"k{n}": ["*"] for n in range(8)}, "admin": "root"}))
    keys.chmod(0o600)
    options = ("--base-name", "base", "--keys", str(keys), "--max-concurrent", "64")
    with served_process(tiny_base, registry.home, tmp_path / "log", *options) as server:
        begun = time.monotonic()
        answered: Counter[str] = Counter()
        memory: list[int] = []

        def one(client: httpx.Client, dice: random.Random) -> None:
            body: dict[str, Any] = {"prompt": dice.choice(PROMPTS), "max_tokens": dice.choice(LENGTHS)}
            body |= {"model": dice.choice(MODELS), "temperature": 0}
            fate = dice.choice(("whole", "whole", "whole", "stream", "abort", "long", "flood", "reload"))
            if fate == "abort":
                with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as got:
                    next(got.iter_lines())
            elif fate == "flood":
                host, port = server.url.removeprefix("http://").split(":")
                crowd = [socket.create_connection((host, int(port)), timeout=60) for _ in range(5)]
                crowd[0].sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 50\r\n\r\n")
                for connection in crowd:
                    connection.close()
            elif fate == "reload":
                root = {"Authorization": "Bearer root"}
                act = dice.choice(("load", "unload"))
                done = client.post(f"/admin/adapters/{act}", json={"reference": "event:1"}, headers=root)
                assert done.status_code == 200, done.text
            else:
                if fate == "long":
                    body |= {"prompt": "x" * 400, "model": "base"}
                got = client.post("/v1/completions", json={**body, "stream": fate == "stream"})
                if got.status_code == 429:
                    answered["429"] += 1
                    return
                assert got.status_code == 200, got.text
                text, receipt = read_answer(got)
                expected = truth.get((body["model"], body["prompt"], body["max_tokens"]))
                assert expected is None or (receipt["adapter_digest"], text) == expected, (body, receipt)
            answered[fate] += 1

        def tenant(number: int) -> None:
            dice, key = random.Random(number), f"Bearer k{number % 8}"
            with httpx.Client(base_url=server.url, timeout=120, headers={"Authorization": key}) as client:
                while time.monotonic() < begun + seconds:
                    one(client, dice)
                    if number == 0:
                        memory.append(server.bytes_of("VmRSS"))

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(tenant, range(64)))
        print(dict(answered), f"{min(memory):,} to {max(memory):,} bytes")
        assert set(answered) >= {"whole", "stream", "abort", "long", "flood", "reload"}
        ask_again = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer root"}, timeout=60)
        assert ask_again.status_code == 200 and server.process.poll() is None
        half = len(memory) // 2
        assert max(memory[half:]) < (1.03 if seconds > 60 else 1.1) * max(memory[:half])


def read_answer(got: httpx.Response) -> tuple[str, dict[str, Any]]:
    """(text, receipt) of a whole answer or of a stream's events."""
    if "event-stream" not in got.headers["content-type"]:
        return got.json()["choices"][0]["text"], got.json()["receipt"]
    events = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events), events[-1]["receipt"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_place(
    serve: Serve, shared_engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    server, _ = serve()
    handles: list[Any] = []
    submit = shared_engine.submit
    monkeypatch.setattr(shared_engine, "submit", lambda request: handles.append(submit(request)) or handles[-1])
    body = json.dumps({"model": "sql", "prompt": "x", "max_tokens": 400, "temperature": 1, "stream": stream}).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            if stream:
                raw.recv(1)
    assert idle(server)
    assert len(handles) == 3 or not stream, "who hangs up at once may come before the engine is asked"

    def let_go() -> bool:
        given_up = all(handle._sequence.cancelled.is_set() for handle in handles)
        return given_up and idle(server) and not any(one.uses for one in shared_engine.resident())

    # The engine does at its next step.
    assert any(let_go() for _ in range(2000) if idle(server))


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400), (b"\xff\xfe{}", 400), (b"[]", 400), (b"null", 400), (b"", 400), (b'{"model": "\\ud800"}', 400),
        (b'{"model": "sql", "prompt": "\\ud800"}', 400), (b'{"model": "sql", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "sql", "prompt": "x", "temperature": 1e999}', 400),
        (b'{"model": "sql\\u0000", "prompt": "x"}', 400), (b"[" * 100_000, 400), (b"x" * 2_000_000, 413),
        (b'{"model": "sql", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
    ],
)  # fmt: skip
def test_bodies_that_are_none(shared_server: ApiServer, content: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    got = httpx.post(f"{shared_server.url}/v1/completions", content=content, headers=headers)
    assert got.status_code == status, got.text
    assert set(got.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_grows_past_the_limit_without_saying_so(shared_server: ApiServer) -> None:
    pieces = (b"x" * 100_000 for _ in range(20))
    headers = {"Content-Type": "application/json"}
    got = httpx.post(f"{shared_server.url}/v1/completions", content=pieces, headers=headers)
    assert got.status_code == 413


def test_too_many_at_once_are_told_to_come_back(serve: Serve) -> None:
    server, _ = serve(max_concurrent=1)
    body = {"model": "sql", "prompt": "x", "max_tokens": 2, "temperature": 0}
    for stream in (False, True):
        with server.api.dispatcher.admit(Caller("anyone", tenant="127.0.0.1")):
            got = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream})
            assert (got.status_code, got.headers["retry-after"]) == (429, "1")
        assert httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}).status_code == 200
    assert idle(server)


def test_a_request_past_its_time_says_so(serve: Serve) -> None:
    server, client = serve(timeout_seconds=0.001)
    with pytest.raises(openai.APIStatusError, match="ran past its limit") as caught:
        client.completions.create(model="sql", prompt="x", max_tokens=300, temperature=0)
    assert caught.value.status_code == 408
    assert idle(server)


def test_an_answer_of_another_adapter_is_never_given_out(
    serve: Serve, registry: AdapterRegistry, monkeypatch: Any
) -> None:
    """The engine is made to answer everything with sql:2: whoever asked for something else gets an error."""
    server, client = serve()
    submit = server.api.dispatcher.engine.submit
    wrong = lambda request: submit(GenerationRequest(prompt=request.prompt, adapter="sql:2", max_new_tokens=2))  # noqa: E731
    monkeypatch.setattr(server.api.dispatcher.engine, "submit", wrong)
    options: Any = {"prompt": "x", "max_tokens": 2, "temperature": 0}
    assert client.completions.create(model="sql:2", **options).receipt["adapter"] == "sql:2"
    for model in ("sql:1", "base", "event"):
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=model, **options)
    with pytest.raises(openai.APIError):
        list(client.completions.create(model="event", stream=True, **options))


SERVE = """
import sys
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings
registry = AdapterRegistry(sys.argv[1])
with InferenceEngine.from_base(sys.argv[2], registry=registry, device="cpu", max_rows=4) as engine:
    server = ApiServer(engine, registry, ServerSettings(port=0, adapters="sql"))
    before = engine.base_digest()
    print(server.url, flush=True)
    server.run()
    print("unchanged" if engine.base_digest() == before else "changed", flush=True)
"""


@pytest.mark.slow
def test_sigterm_drains_and_sigkill_loses_nothing_kept(registry: AdapterRegistry, tiny_base: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVE, str(registry.home), str(tiny_base)]
    body = {"model": "sql:1", "prompt": "x", "max_tokens": 300, "temperature": 0, "stream": True}
    texts = []
    for how in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as got:
                lines = got.iter_lines()
                first = next(lines)
                process.send_signal(how)
                if how == signal.SIGTERM:
                    texts = [first, *lines]
            process.wait()
            if how == signal.SIGTERM:
                assert process.returncode == 0
                assert process.stdout.read() == "unchanged\n"
    assert texts[-2] == "data: [DONE]" or "data: [DONE]" in texts
    assert any('"finish_reason":"length"' in line or '"finish_reason":"stop"' in line for line in texts)
