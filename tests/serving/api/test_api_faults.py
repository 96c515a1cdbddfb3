"""Whose fault an error is, what the log and the metrics hold of it, and keys that come and go."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapterhub_lite import __version__
from adapterhub_lite.errors import (
    AdapterHubError,
    ConfigurationError,
    HubUnreachableError,
    IntegrityError,
    RegistryError,
    ResourceError,
)
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.api.auth import KeyFile, KeyRing
from adapterhub_lite.serving.api.errors import error_body
from adapterhub_lite.serving.api.observe import BoundedLabels, adapter_label
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.wire.requests import ChatMessage

Serve = Callable[..., tuple[ApiServer, openai.OpenAI]]
ASK = {"model": "sql", "prompt": "x", "max_tokens": 2, "temperature": 0}
KEYS = {"keys": {"sk-a": ["sql"], "sk-b": ["event"]}, "admin": "sk-admin", "metrics": "sk-metrics"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (IntegrityError("damaged in /home/me/secret"), 500), (RegistryError("/home/me/secret"), 503),
        (ResourceError("the disk under /home/me/secret"), 503), (HubUnreachableError("/home/me/secret"), 503),
        (OSError("/home/me/secret"), 500), (AdapterHubError("/home/me/secret"), 500),
    ],
)  # fmt: skip
def test_faults_of_ours_are_5xx_without_paths(error: Exception, status: int) -> None:
    got, body = error_body(error)
    assert got == status
    assert "secret" not in json.dumps(body)
    assert "log" in body["error"]["message"]


def test_a_failure_is_logged_with_time_level_id_and_traceback(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adapterhub.access")
    server, _ = serve()

    def broken(request: GenerationRequest) -> Any:
        raise RuntimeError("the bank is empty")

    monkeypatch.setattr(server.api.dispatcher.engine, "submit", broken)
    got = httpx.post(f"{server.url}/v1/completions", json=ASK, headers={"X-Request-Id": "mine:17"})
    assert (got.status_code, got.headers["x-request-id"]) == (500, "mine:17")
    assert "bank" not in got.text
    # The line is written when the answer has been sent.
    while not (lines := [json.loads(one.message) for one in caplog.records if "mine:17" in one.message]):
        httpx.get(f"{server.url}/health")
    (line,) = lines
    assert (line["level"], line["status"], line["error"]) == ("error", 500, "RuntimeError")
    assert "the bank is empty" in line["traceback"] and "in broken" in line["traceback"]
    assert line["time"].startswith("20") and line["time"].endswith("+00:00")


@pytest.mark.parametrize("given", ["a" * 200, "a b", "<script>", ""])
def test_a_request_id_that_could_do_harm_is_replaced(shared_server: ApiServer, given: str) -> None:
    got = httpx.get(f"{shared_server.url}/health", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert got != given and len(got) == 32


@pytest.fixture
def keyed(serve: Serve) -> Iterator[ApiServer]:
    server, _ = serve(keys=KeyRing(KeyFile.model_validate(KEYS, strict=False)))
    yield server


def test_each_key_sees_its_own_metrics_and_the_metrics_key_all(keyed: ApiServer) -> None:
    def scrape(key: str) -> httpx.Response:
        return httpx.get(f"{keyed.url}/metrics", headers=bearer(key))

    for key, model in (("sk-a", "sql"), ("sk-b", "event")):
        assert httpx.post(f"{keyed.url}/v1/completions", json={**ASK, "model": model}, headers=bearer(key)).is_success
    assert 'adapter="sql:2"' in scrape("sk-a").text and "event" not in scrape("sk-a").text
    assert 'adapter="event:1"' in scrape("sk-b").text and "sql" not in scrape("sk-b").text
    for key in ("sk-admin", "sk-metrics"):
        text = scrape(key).text
        assert 'adapter="event:1"' in text and 'adapter="sql:2"' in text
        assert text.count('adapterhub_tenant_tokens_total{kind="completion",tenant="key-') == 2
    for path in ("/v1/models", "/v1/models/sql"):
        assert httpx.get(f"{keyed.url}{path}", headers=bearer("sk-metrics")).status_code == 403
    assert httpx.post(f"{keyed.url}/v1/completions", json=ASK, headers=bearer("sk-metrics")).status_code == 403


def test_weights_and_typing_errors_make_no_labels(serve: Serve) -> None:
    server, client = serve()
    for weight in (0.25, 0.5, 0.75):
        client.completions.create(**{**ASK, "model": f"sql:1*{weight}"})
        client.completions.create(**{**ASK, "model": f"sql:1*{weight}+event*0.5"})
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**{**ASK, "model": f"unknown{weight}"})
    text = httpx.get(f"{server.url}/metrics").text
    assert 'adapterhub_tokens_total{adapter="sql:1",kind="completion"} 6.0' in text
    assert 'adapterhub_tokens_total{adapter="blend",kind="completion"} 6.0' in text
    assert "0.25" not in [line.partition('adapter="')[2].partition('"')[0] for line in text.splitlines()]
    assert "unknown" not in text


def test_labels_are_bounded() -> None:
    bounded = BoundedLabels(5)
    assert [bounded(adapter_label(f"sql:{n}")) for n in range(4)] == ["sql:0", "sql:1", "other", "other"]
    assert bounded("sql:1") == "sql:1" and bounded(adapter_label(None)) == "base"


def test_documentation_needs_a_key_and_loads_nothing_from_elsewhere(keyed: ApiServer) -> None:
    for path in ("/docs", "/openapi.json", "/metrics", "/nothing", "/redoc"):
        assert httpx.get(f"{keyed.url}{path}").status_code == 401
    page = httpx.get(f"{keyed.url}/docs", headers=bearer("sk-a"))
    assert "/v1/chat/completions" in page.text and "<script" not in page.text
    assert "http" not in page.text.replace("http_error", "")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


def test_a_key_is_not_told_what_others_may_use(keyed: ApiServer) -> None:
    for model in ("sql:99", "sql@nothing"):
        got = httpx.post(f"{keyed.url}/v1/completions", json={**ASK, "model": model}, headers=bearer("sk-a"))
        assert got.status_code == 404 and "event" not in got.text, got.text
    got = httpx.post(f"{keyed.url}/v1/completions", json={**ASK, "model": "nothing"}, headers=bearer("sk-a"))
    assert got.status_code == 403 and "event" not in got.text


def test_nothing_of_a_strangers_body_is_read(keyed: ApiServer) -> None:
    read = 0

    def pieces() -> Iterator[bytes]:
        nonlocal read
        for _ in range(20):
            read += 50_000
            yield b"x" * 50_000

    headers = {"Content-Type": "application/json"}
    got = httpx.post(f"{keyed.url}/v1/completions", content=pieces(), headers=headers)
    assert got.status_code == 401


def test_other_sites_and_rebound_names_get_nothing(shared_server: ApiServer, serve: Serve) -> None:
    url = f"{shared_server.url}/v1/completions"
    assert httpx.post(url, json=ASK, headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx.post(url, json=ASK, headers={"Host": "evil.example"}).status_code == 421
    assert httpx.post(url, content=json.dumps(ASK), headers={"Content-Type": "text/plain"}).status_code == 415
    named, _ = serve(allowed_hosts="evil.example, api.example")
    assert httpx.get(f"{named.url}/v1/models", headers={"Host": "api.example"}).status_code == 200


@pytest.mark.parametrize(
    ("name", "kept"),
    [("temperature", 200), ("top_p", 200), ("stop", 200), ("stream", 200), ("logprobs", 200), ("tools", 200),
     ("logit_bias", 200), ("response_format", 200), ("stream_options", 200), ("no_such_field", 400)],
)  # fmt: skip
def test_null_means_not_given(shared_server: ApiServer, name: str, kept: int) -> None:
    body = {"model": "sql", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}], name: None}
    assert httpx.post(f"{shared_server.url}/v1/chat/completions", json=body).status_code == kept


@pytest.mark.parametrize(
    ("more", "status"),
    [({"tools": []}, 200), ({"tools": [{}]}, 400), ({"tool_choice": "none"}, 200), ({"tool_choice": "auto"}, 400),
     ({"logit_bias": {}}, 200), ({"top_k": -1}, 200), ({"top_k": -2}, 400),
     ({"seed": -1}, 200), ({"parallel_tool_calls": False}, 200), ({"parallel_tool_calls": 0}, 400),
     ({"modalities": ["text"]}, 200), ({"modalities": ["audio"]}, 400), ({"store": True}, 400),
     ({"max_completion_tokens": 1}, 200), ({"max_completion_tokens": 2}, 400)],
)  # fmt: skip
def test_what_asks_for_nothing_is_as_if_it_were_not_there(
    shared_server: ApiServer, more: dict[str, Any], status: int
) -> None:
    body = {"model": "sql", "max_tokens": 1, "temperature": 0, "messages": [{"role": "user", "content": "a"}]}
    plain, got = (httpx.post(f"{shared_server.url}/v1/chat/completions", json=body | one) for one in ({}, more))
    assert got.status_code == status, got.text
    if status == 200:
        assert got.json()["choices"] == plain.json()["choices"]
    else:
        assert next(iter(more)) in got.json()["error"]["message"]


def test_the_name_of_a_message_reaches_the_template() -> None:
    message = ChatMessage.model_validate({"role": "user", "content": "a", "name": "bob"})
    assert message.plain() == {"role": "user", "content": "a", "name": "bob"}


def test_our_own_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "a"}]
    answer = client.chat.completions.create(model="sql", messages=messages, max_tokens=2).choices[0].message
    for again in (answer, answer.model_dump(), answer.to_dict()):
        client.chat.completions.create(model="sql", messages=[*messages, again, *messages], max_tokens=2)


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("completions", {"prompt": ["a"] * 2049}, "prompt"),
        ("completions", {"prompt": 5}, "prompt"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "temperature"),
        ("completions", {"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"prompt": [[1], ["b"]]}, "prompt"),
        ("completions", {}, "prompt"),
        ("chat/completions", {"top_p": 0}, "top_p"),
        ("chat/completions", {"zzz": 1}, "zzz"),
        ("chat/completions", {"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ("chat/completions", {"max_tokens": 10**9}, "max_tokens"),
        ("chat/completions", {"max_tokens": 2, "max_completion_tokens": 1}, "max_tokens"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_wrong_is_said_in_words_with_its_field(
    shared_server: ApiServer, path: str, more: Any, param: str
) -> None:
    body = {"model": "sql", "max_tokens": 1, **more}
    if path.startswith("chat"):
        body["messages"] = [{"role": "user", "content": "a"}]
    got = httpx.post(f"{shared_server.url}/v1/{path}", json=body)
    assert got.status_code == 400
    error = got.json()["error"]
    assert error["param"].startswith(param)
    assert param in error["message"] or "new tokens" in error["message"]
    for word in ("Input", "constrained", "tuple", "should", "field required", "pydantic"):
        assert word not in error["message"]


def test_a_body_that_is_not_there_is_said_to_be_missing(shared_server: ApiServer) -> None:
    answer = httpx.post(f"{shared_server.url}/v1/completions", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "The body is missing."
    assert httpx.get(f"{shared_server.url}/openapi.json").json()["info"]["version"] == __version__


def test_a_name_that_does_not_fit_is_told_what_would(shared_server: ApiServer) -> None:
    tool = {"type": "function", "function": {"name": "a b"}}
    body = {"model": "sql", "messages": [{"role": "user", "content": "a"}], "tools": [tool]}
    told = httpx.post(f"{shared_server.url}/v1/chat/completions", json=body).json()["error"]["message"]
    assert "tools.0.function.name" in told and "wanted text that fits ^[a-zA-Z0-9_.-]{1,64}$" in told


def test_json_that_ends_too_early_names_no_parameter(shared_server: ApiServer) -> None:
    headers = {"Content-Type": "application/json"}
    got = httpx.post(f"{shared_server.url}/v1/completions", content=b'{"model": "a', headers=headers)
    assert (got.status_code, got.json()["error"]["param"]) == (400, None)


def test_keys_are_read_again_when_their_file_changes(
    tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"

    def write(content: str, mode: int = 0o600) -> None:
        fresh = tmp_path / "fresh"
        fresh.write_text(content)
        fresh.chmod(mode)
        fresh.replace(path)

    write('{"keys": {"old": ["sql"]}}')
    server, _ = serve(keys=KeyRing.read(path))

    def status(key: str) -> int:
        return httpx.post(f"{server.url}/v1/completions", json=ASK, headers=bearer(key)).status_code

    assert (status("old"), status("new")) == (200, 401)
    write('{"keys": {"new": {"adapters": ["sql"], "requests_in_work": 1, "tokens_per_minute": 5}}}')
    assert (status("old"), status("new")) == (401, 200)
    for broken in ("{", '{"keys": {"old": ["sql"]}, "admin": "old"}'):
        write(broken)
        assert (status("old"), status("new")) in ((401, 200), (401, 429)), "the keys that were read stay in force"
    write('{"keys": {"old": ["sql"]}}', 0o644)
    assert status("old") == 401
    path.unlink()
    assert status("old") == 401
    assert "chmod 600" in caplog.text
    write('{"keys": {"old": ["sql"]}}')
    assert status("old") == 200


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": {"old": ["sql"]}}')
    for mode in (0o644, 0o640, 0o604, 0o622):
        path.chmod(mode)
        with pytest.raises(ConfigurationError, match="chmod 600"):
            KeyRing.read(path)


def test_a_damaged_database_is_our_fault(
    make_engine: Callable[..., InferenceEngine], tiny_base: Path, adapters: dict[str, Path], home: Path
) -> None:
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.serving.api.settings import ServerSettings

    registry = AdapterRegistry(home)
    registry.add(adapters["small"], "sql", base=resolve_base(tiny_base))
    with ApiServer(make_engine(registry=registry), registry, ServerSettings(port=0)) as server:
        url = f"{server.url}/v1/completions"
        assert httpx.post(url, json=ASK).status_code == 200
        for name in ("registry.db", "registry.db-wal", "registry.db-shm"):
            if (home / name).exists():
                (home / name).rename(home / f"{name}.old")
        (home / "registry.db").write_bytes(os.urandom(20_000))
        for _ in range(2):
            got = httpx.post(url, json=ASK)
            assert got.status_code in (500, 503) and str(home) not in got.text, got.text
        assert httpx.get(f"{server.url}/v1/models").status_code in (500, 503)
