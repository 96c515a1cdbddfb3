"""A vLLM that fails, forgets, refuses or answers as another: what the request gets, and that a later one works."""

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub_lite.errors import (
    AdapterRejectedError,
    BaseMismatchError,
    ConfigurationError,
    EngineUnreachableError,
    IntegrityError,
    ServingError,
)
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, GenerationResult, InferenceEngine
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.serving.vllm.engine import VllmEngine
from tests.serving.vllm.pretend import PretendVllm

Before = Callable[..., VllmEngine]
Pretend = Callable[..., PretendVllm]


def ask(engine: VllmEngine, adapter: str | Path | None = "sql:1", **more: Any) -> GenerationResult:
    return engine.generate(
        GenerationRequest(**{"prompt": "select the", "adapter": adapter, "max_new_tokens": 8, **more})
    )


def truth(engine: InferenceEngine, adapter: str | None = "sql:1") -> str:
    return engine.generate(GenerationRequest(prompt="select the", adapter=adapter, max_new_tokens=8)).text


def test_an_adapter_is_loaded_once_under_its_digest_from_a_folder_of_ours(
    vllm: PretendVllm, before: Before, registry: AdapterRegistry
) -> None:
    engine = before(vllm)
    for _ in range(3):
        ask(engine, "sql@prod")
    digest = registry.resolve("sql@prod").digest
    assert vllm.asked[f"load {digest}"] == 1 and vllm.asked[f"ask {digest}"] == 3
    folder = vllm.adapters[digest]
    assert folder.parent.stat().st_mode & 0o077 == 0
    assert all(body["model"] in (digest, "tiny") for body in vllm.bodies)
    engine.close()
    assert not folder.parent.exists()


def test_the_least_recently_used_makes_room_and_is_loaded_again(
    vllm: PretendVllm, before: Before, shared_engine: InferenceEngine
) -> None:
    engine = before(vllm, slots=2)
    for adapter in ("sql:1", "sql:2", "sql:1", "event", "sql:2", "sql:1*0.5+event*2"):
        assert ask(engine, adapter).text == truth(shared_engine, adapter)
        assert len(vllm.adapters) <= 2
        assert set(vllm.adapters.values()) == set(engine._shelf.folder.iterdir())
    assert engine.status().evictions == 3


def test_blends_of_the_same_adapters_are_as_many_models(
    vllm: PretendVllm, before: Before, shared_engine: InferenceEngine
) -> None:
    engine, blends = before(vllm), ("sql:1*0.5+event*2", "sql:1*2+event*0.5", "sql:1*2", "sql:1")
    wanted = [truth(shared_engine, blend) for blend in blends]
    assert [ask(engine, blend).text for blend in blends * 2] == wanted * 2 and len(set(wanted)) == len(blends)
    assert len(vllm.adapters) == len(blends)


def test_one_that_is_in_use_is_not_unloaded(vllm: PretendVllm, before: Before, shared_engine: InferenceEngine) -> None:
    engine = before(vllm, slots=1)
    vllm.faults.append("wait")
    handle = engine.submit(GenerationRequest(prompt="select the", adapter="sql:1", max_new_tokens=8))
    chunks = iter(handle)
    first = next(chunks)
    with pytest.raises(ServingError, match="slots are in use"):
        ask(engine, "sql:2", timeout_seconds=0.2)
    vllm.go_on.set()
    assert first.text + "".join(one.text for one in chunks) == truth(shared_engine, "sql:1")
    assert ask(engine, "sql:2").text == truth(shared_engine, "sql:2")


def test_one_that_is_wanted_again_while_it_is_unloaded_is_written_again(
    vllm: PretendVllm, before: Before, shared_engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, wanted = before(vllm), truth(shared_engine)
    assert ask(engine).text == wanted
    vllm.faults.append("slow unload")
    taken, put = threading.Event(), engine._shelf.put

    def noting(*arguments: Any) -> Any:
        found = put(*arguments)
        taken.set()
        return found

    monkeypatch.setattr(engine._shelf, "put", noting)
    with ThreadPoolExecutor(2) as pool:
        unloading = pool.submit(engine.unload, "sql:1")
        while not any(key.startswith("unload") for key in vllm.asked):
            taken.wait(0.01)
        asking = pool.submit(ask, engine)
        # Nobody may take the folder meanwhile; who could has had the time.
        assert not taken.wait(1.0)
        vllm.go_on.set()
        assert unloading.result(60) and asking.result(60).text == wanted
    assert set(vllm.adapters.values()) == set(engine._shelf.folder.iterdir())


def test_an_eviction_that_comes_late_leaves_what_is_wanted_again(
    vllm: PretendVllm, before: Before, registry: AdapterRegistry
) -> None:
    """It leaves its slot first and vLLM afterwards; in between somebody may have taken it again."""
    engine, digest = before(vllm), registry.resolve("sql:1").digest
    ask(engine)
    engine.backends[0]._evicted(digest)
    assert digest in vllm.adapters and not vllm.asked[f"unload {digest}"]
    ask(engine)
    assert vllm.asked[f"load {digest}"] == 1


def test_a_stream_stays_on_its_bytes_while_the_reference_moves(
    vllm: PretendVllm, before: Before, registry: AdapterRegistry, shared_engine: InferenceEngine
) -> None:
    engine = before(vllm)
    registry.set_alias("sql", "here", version=1)
    try:
        vllm.faults.append("wait")
        chunks = iter(engine.submit(GenerationRequest(prompt="select the", adapter="sql@here", max_new_tokens=8)))
        text = next(chunks).text
        registry.set_alias("sql", "here", version=2)
        assert ask(engine, "sql@here").adapter == "sql:2"
        vllm.go_on.set()
        rest = list(chunks)
    finally:
        registry.remove_alias("sql", "here")
    assert text + "".join(one.text for one in rest) == truth(shared_engine, "sql:1")
    assert rest[-1].result is not None and rest[-1].result.adapter == "sql:1"


def test_a_killed_vllm_fails_the_request_with_503_and_a_later_one_works(
    vllm: PretendVllm, before: Before, registry: AdapterRegistry, shared_engine: InferenceEngine
) -> None:
    engine = before(vllm)
    body = {"model": "sql:1", "prompt": "select the", "max_tokens": 8, "temperature": 0}
    with ApiServer(engine, registry, ServerSettings(port=0)) as server:

        def post(**more: Any) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=60)

        assert post().json()["choices"][0]["text"] == truth(shared_engine)
        vllm.kill()
        for more in ({}, {"stream": True}):
            found = post(**more)
            assert found.status_code == 503 and found.json()["error"]["code"] == "engine_unreachable"
            assert found.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 503
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        vllm.start()
        found = post()
        assert found.status_code == 200 and found.json()["choices"][0]["text"] == truth(shared_engine)
        assert found.json()["receipt"]["adapter_digest"] == registry.resolve("sql:1").digest


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("break off", EngineUnreachableError), ("error in the middle", ServingError), ("wrong model", ServingError)],
)
def test_a_stream_that_fails_in_the_middle_says_so(
    fault: str, kind: type[Exception], vllm: PretendVllm, before: Before, shared_engine: InferenceEngine
) -> None:
    engine = before(vllm)
    vllm.faults.append(fault)
    with pytest.raises(kind):
        list(engine.submit(GenerationRequest(prompt="select the", adapter="sql:1", max_new_tokens=8)))
    assert ask(engine).text == truth(shared_engine) and engine.status().running == 0


@pytest.mark.parametrize(("fault", "kind"), [("overloaded", EngineUnreachableError), ("broken", ServingError)])
def test_an_answer_that_fails_says_so(fault: str, kind: type[Exception], vllm: PretendVllm, before: Before) -> None:
    engine = before(vllm)
    vllm.faults.append(fault)
    with pytest.raises(kind):
        ask(engine)
    assert ask(engine).token_ids


def test_a_vllm_that_began_anew_unseen_is_given_the_adapter_again(
    vllm: PretendVllm, before: Before, shared_engine: InferenceEngine, registry: AdapterRegistry
) -> None:
    engine = before(vllm)
    assert ask(engine).text == truth(shared_engine)
    vllm.adapters.clear()
    assert ask(engine).text == truth(shared_engine)
    vllm.adapters.clear()
    pieces = list(engine.submit(GenerationRequest(prompt="select the", adapter="sql:1", max_new_tokens=8)))
    assert "".join(one.text for one in pieces) == truth(shared_engine)
    assert vllm.asked[f"load {registry.resolve('sql:1').digest}"] == 3


def test_one_that_has_the_name_from_before_is_given_our_folder(
    vllm: PretendVllm, before: Before, registry: AdapterRegistry, shared_engine: InferenceEngine, tmp_path: Path
) -> None:
    vllm.adapters[registry.resolve("sql:1").digest] = tmp_path
    assert ask(before(vllm)).text == truth(shared_engine)


def test_what_vllm_does_not_serve_is_refused_before_it_is_loaded(
    vllm: PretendVllm, before: Before, make_adapter: Any, adapters: dict[str, Path], shared_engine: InferenceEngine
) -> None:
    engine = before(vllm, max_rank=4)
    dora = make_adapter(7, use_dora=True)
    for adapter, reason in (
        (dora, "DoRA.*merge --into-base"),
        ("sql:2", "rank 8.*--vllm-max-rank.*--method svd"),
        ("sql:1+sql:1+sql:1*2", "rank 6"),
    ):
        with pytest.raises(AdapterRejectedError, match=reason):
            ask(engine, adapter)
    assert not vllm.adapters and not any(key.startswith("load") for key in vllm.asked)
    assert list(engine._shelf.folder.iterdir()) == []
    # What it reads otherwise in some versions goes over as one plain adapter.
    wide = before(vllm)
    for name in ("patterned", "rs", "partial"):
        request = GenerationRequest(prompt="select the", adapter=adapters[name], max_new_tokens=8)
        assert wide.generate(request).token_ids == shared_engine.generate(request).token_ids


def test_what_vllm_itself_refuses_is_told(pretend: Pretend, before: Before) -> None:
    engine = before(pretend(max_rank=4))
    with pytest.raises(AdapterRejectedError, match="greater than max_lora_rank 4"):
        ask(engine, "sql:2")
    assert ask(engine, "sql:1").token_ids and engine.resident()[0].rank == 2


def test_damaged_bytes_are_never_loaded(
    vllm: PretendVllm, before: Before, home: Path, tiny_base: Path, adapters: dict[str, Path]
) -> None:
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.serving.adapters.sources import RegistrySource

    registry, base = AdapterRegistry(home), resolve_base(tiny_base)
    manifest = registry.add(adapters["small"], "sql", base=base)
    with VllmEngine(base, [vllm.url], RegistrySource(registry, base)) as engine:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            path = registry.file(manifest, name)
            content = path.read_bytes()
            path.chmod(0o600)
            # Of the same size, as a disk damages it.
            other = (
                content.replace(b'"lora_alpha": 6', b'"lora_alpha": 7')
                if name.endswith("json")
                else content[:-1] + b"\x01"
            )
            assert other != content
            path.write_bytes(other)
            with pytest.raises(IntegrityError):
                ask(engine)
            path.write_bytes(content)
        assert engine.status().damaged == 2 and not vllm.adapters
        assert ask(engine).token_ids


def test_a_client_that_leaves_stops_vllm(vllm: PretendVllm, before: Before, registry: AdapterRegistry) -> None:
    engine = before(vllm)
    body = {"model": "sql:1", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    waited = threading.Event()
    with ApiServer(engine, registry, ServerSettings(port=0)) as server:
        vllm.faults.append("wait")  # neither answer ends by itself
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as got:
            next(got.iter_lines())
        while vllm.cancelled < 1 or vllm.running:
            waited.wait(0.02)
        vllm.faults.append("hold")
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as leaving:
            leaving.sendall(head.encode() + content)
            while not vllm.running:
                waited.wait(0.02)
        while vllm.cancelled < 2 or vllm.running or engine.status().running:
            waited.wait(0.02)
    assert vllm.cancelled == 2


def test_the_key_goes_along_and_a_wrong_one_is_said(pretend: Pretend, before: Before) -> None:
    server = pretend(key="secret")
    with pytest.raises(ConfigurationError, match="--engine-key"):
        before(server, key="other")
    assert ask(before(server, key="secret")).token_ids


def test_nobody_at_the_address_is_said(pretend: Pretend, before: Before) -> None:
    server = pretend()
    server.kill()
    with pytest.raises(EngineUnreachableError):
        before(server)


def another(tiny_base: Path, folder: Path) -> Path:
    """A base of the same shape with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.model.embed_tokens.weight.data += 0.05
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def test_a_vllm_that_serves_another_base_is_refused(
    pretend: Pretend, before: Before, tiny_base: Path, tmp_path: Path, home: Path, computing: InferenceEngine
) -> None:
    right = pretend()
    engine = before(right, home=home)
    difference = engine.status().difference
    assert difference is not None and difference < 1e-3
    asked = right.asked["ask tiny"]
    with InferenceEngine.from_base(another(tiny_base, tmp_path / "other"), device="cpu", max_rows=4) as wrong:
        right.engine = wrong
        with pytest.raises(BaseMismatchError, match="answers otherwise than"):
            before(right, home=home)
    right.engine = computing
    # The base's own answers are computed once.
    assert len(list((home / "verdicts").glob("next-tokens-*"))) == 1 and right.asked["ask tiny"] > asked
    right.faults.append("other tokens")
    with pytest.raises(BaseMismatchError, match="another tokenizer"):
        before(right, home=home)
