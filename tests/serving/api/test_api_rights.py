"""Keys, permissions, the admin's door, and what the log may never hold."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.serving.api import server as server_module
from adapterhub_lite.serving.api.auth import KeyFile, KeyRing
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings

Serve = Callable[..., tuple[ApiServer, openai.OpenAI]]
KEYS = KeyRing(KeyFile(keys={"sk-sql": ("sql",), "sk-all": ("*",), "sk-base": ()}, admin="sk-admin"))
ASK = {"prompt": "a secret prompt", "max_tokens": 2, "temperature": 0}


@pytest.mark.parametrize(
    ("key", "model", "status"),
    [
        ("sk-sql", "sql", 200), ("sk-sql", "sql@prod", 200), ("sk-sql", "base", 200), ("sk-sql", "event", 403),
        ("sk-sql", "sql*0.5+event*0.5", 403), ("sk-base", "base", 200), ("sk-base", "sql", 403),
        ("sk-all", "event", 200), ("sk-admin", "event", 200), ("sk-wrong", "base", 401), ("", "base", 401),
    ],
)  # fmt: skip
def test_a_key_opens_its_adapters_and_no_others(serve: Serve, key: str, model: str, status: int) -> None:
    server, _ = serve(keys=KEYS)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    got = httpx.post(f"{server.url}/v1/completions", json={"model": model, **ASK}, headers=headers)
    assert got.status_code == status, got.text
    if status != 200:
        assert got.json()["error"]["code"] in ("invalid_api_key", "adapter_not_allowed")


def test_a_digest_is_no_way_around_a_permission(serve: Serve, registry: AdapterRegistry) -> None:
    _, client = serve("sk-sql", keys=KEYS)
    assert client.completions.create(model=registry.resolve("sql:1").digest, **ASK).receipt["adapter"] == "sql:1"
    with pytest.raises(openai.PermissionDeniedError):
        client.completions.create(model=registry.resolve("event").digest, **ASK)
    assert {model.id for model in client.models.list()} == {"base", "sql", "sql:1", "sql:2", "sql@prod"}


def test_only_the_admin_loads_unloads_and_moves_aliases(serve: Serve, registry: AdapterRegistry) -> None:
    server, _ = serve(keys=KEYS)

    def call(key: str, path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{server.url}/admin/{path}", json=body, headers={"Authorization": f"Bearer {key}"})

    for key, status in (("sk-all", 403), ("sk-wrong", 401)):
        assert call(key, "adapters/load", reference="sql:1").status_code == status
        assert call(key, "aliases", name="sql", alias="x", version=1).status_code == status
    assert call("sk-admin", "adapters/load", reference="sql@prod").json()["name"] == "sql:1"
    assert call("sk-admin", "adapters/unload", reference="sql:1").json() == {"name": "sql:1", "unloaded": True}
    for path in ("/etc", "../x", str(registry.home)):
        assert call("sk-admin", "adapters/load", reference=path).status_code == 400
    assert call("sk-admin", "aliases", name="sql", alias="beta", version=2, expect=0).status_code == 200
    assert registry.resolve("sql@beta").version == 2
    assert call("sk-admin", "aliases", name="sql", alias="beta", version=1, expect=1).status_code == 409
    assert call("sk-admin", "aliases", name="sql", alias="beta", version=9).status_code == 404
    registry.remove_alias("sql", "beta")


def test_a_split_gets_its_share_of_what_http_asks_for(serve: Serve, registry: AdapterRegistry) -> None:
    server, client = serve("sk-sql", keys=KEYS)

    def call(share: float, **wish: str) -> httpx.Response:
        body = {"reference": "sql@prod", "candidate": "sql:2", "share": share, **wish}
        return httpx.post(f"{server.url}/admin/splits", json=body, headers={"Authorization": "Bearer sk-admin"})

    def shares(count: int, model: str = "sql@prod") -> list[str]:
        asked = [client.completions.create(model=model, **ASK) for _ in range(count)]
        for answer in asked:
            receipt = answer.receipt  # type: ignore[attr-defined]
            assert receipt["adapter_digest"].startswith(registry.resolve(receipt["adapter"].partition("*")[0]).digest)
        return [answer.receipt["adapter"] for answer in asked]  # type: ignore[attr-defined]

    try:
        assert call(0.1).json() == {"reference": "sql@prod", "candidate": "sql:2", "share": 0.1}
        assert shares(20).count("sql:2") == 2
        assert call(0.5).status_code == 200
        for wanted in ("sql:1", "sql:2") * 2:
            client.models.retrieve("sql@prod")  # looking is not asking: it takes nobody's turn
            assert shares(1) == [wanted]
        assert call(1.0).status_code == 200
        assert shares(2) == ["sql:2"] * 2
        assert shares(1, "sql@prod*0.5") == ["sql:2*0.5"]
        assert shares(2, "sql:1") == ["sql:1"] * 2
        streamed = list(client.completions.create(model="sql@prod", stream=True, **ASK))
        assert {piece.receipt["adapter"] for piece in streamed} == {"sql:2"}  # type: ignore[attr-defined]
        told = httpx.get(f"{server.url}/admin/splits", headers={"Authorization": "Bearer sk-admin"}).json()
        assert told == {"splits": [{"reference": "sql@prod", "candidate": "sql:2", "share": 1.0}]}
    finally:
        assert call(0).json() == {"reference": "sql@prod", "stopped": True}
    assert shares(3) == ["sql:1"] * 3
    assert call(0.5, candidate="sql:9").status_code == 404
    assert call(0.5, reference="nothing").status_code == 404
    for wish in ({"candidate": "/etc"}, {"reference": "../x"}, {"reference": registry.resolve("sql:1").digest}):
        assert call(0.5, **wish).status_code == 400
    assert call(1.5).status_code == 400
    other = call(0.5, candidate="event")
    assert other.status_code == 400 and "between versions of one adapter" in other.text, "a key for sql opens no event"
    assert (
        httpx.post(f"{server.url}/admin/splits", json={}, headers={"Authorization": "Bearer sk-sql"}).status_code == 403
    )


def test_an_open_server_has_no_admin(serve: Serve) -> None:
    server, _ = serve()
    assert httpx.post(f"{server.url}/admin/adapters/load", json={"reference": "sql"}).status_code == 403


def test_a_server_started_for_one_adapter_serves_that_one(serve: Serve) -> None:
    server, client = serve(adapters="sql@prod", base_name="tiny")
    assert "sql:1" in {one.name for one in server.api.dispatcher.engine.resident()}
    assert client.completions.create(model="tiny", **ASK).receipt["adapter"] is None
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="event", **ASK)


def test_the_log_tells_of_a_request_but_not_what_was_said(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adapterhub.access")
    server, client = serve("sk-sql", keys=KEYS)
    answer = client.completions.create(model="sql@prod", **ASK)
    httpx.get(f"{server.url}/health")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "adapterhub.access"]
    told = next(line for line in lines if line["route"] == "/v1/completions")
    assert (told["status"], told["adapter"], told["usage"]["completion_tokens"]) == (200, "sql:1", 2)
    assert told["caller"].startswith("key-")
    everything = caplog.text
    assert "secret" not in everything
    assert "sk-sql" not in everything
    assert answer.choices[0].text.strip() == "" or answer.choices[0].text not in everything


def test_metrics_count_by_what_answered(serve: Serve) -> None:
    server, client = serve()
    client.completions.create(model="sql@prod", **ASK)
    list(client.completions.create(model="event", stream=True, **ASK))
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", **ASK)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'adapterhub_tokens_total{adapter="sql:1",kind="completion"} 2.0' in text
    assert 'adapterhub_time_to_first_token_seconds_count{adapter="event:1"} 1.0' in text
    assert 'adapterhub_requests_total{adapter="none",route="/v1/completions",status="404"} 1.0' in text
    for line in ("prompts_in_work 0.0", "requests_in_rows 0.0", "requests_waiting 0.0"):
        assert f"adapterhub_{line}" in text
    resident = len(server.api.dispatcher.engine.resident())
    assert f"adapterhub_adapters_resident {float(resident)}" in text and resident


def test_ready_is_said_by_the_engine_too(
    serve: Serve,
    make_engine: Callable[..., InferenceEngine],
    registry: AdapterRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "ENDED_SECONDS", 600.0)
    engine = make_engine(registry=registry)
    server, client = serve(engine=engine)
    client.completions.create(model="sql@prod", **ASK)
    got = httpx.get(f"{server.url}/ready")
    assert (got.status_code, got.json()) == (
        200,
        {"status": "ready", "resident": 1, "waiting": 0, "can_pull": None},
    )
    engine.close()
    got = httpx.get(f"{server.url}/ready")
    assert (got.status_code, got.json()["status"]) == (503, "engine ended")
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()) == (503, {"status": "engine ended"})
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="sql@prod", **ASK)
    assert caught.value.status_code == 503


@pytest.mark.parametrize("text", ["", "[]", "{", '{"keys": {"a": "sql"}}', '{"key": {}}'])
def test_a_file_of_keys_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="not a file of keys"):
        KeyRing.read(path)


def test_others_are_let_in_with_keys_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs keys"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", keys=tmp_path / "keys.json").host == "0.0.0.0"
    with pytest.raises(ConfigurationError, match="above 0"):
        ServerSettings(max_concurrent=0)
