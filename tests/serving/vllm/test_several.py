"""Several vLLM servers as one engine: who gets a request, and what happens when one of them dies and comes back."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapterhub_lite.errors import ConfigurationError, EngineUnreachableError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.vllm.engine import MUCH_LESS, VllmEngine
from tests.serving.vllm.pretend import PretendVllm

Before = Callable[..., VllmEngine]
MODELS = ("sql:1", "sql:2", "event")


def request(adapter: str | None = "sql:1", tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(prompt="select the", adapter=adapter, max_new_tokens=tokens)


@pytest.fixture
def pair(pretend: Callable[..., PretendVllm]) -> tuple[PretendVllm, PretendVllm]:
    return pretend(), pretend()


def asked(server: PretendVllm, digest: str) -> int:
    return server.asked[f"ask {digest}"]


def test_requests_for_an_adapter_stay_where_it_is(
    pair: tuple[PretendVllm, PretendVllm], before: Before, registry: AdapterRegistry
) -> None:
    engine = before(*pair)
    for _ in range(6):
        for model in MODELS:
            engine.generate(request(model))
    for model in MODELS:
        digest = registry.resolve(model).digest
        assert sorted(asked(server, digest) for server in pair) == [0, 6]
        assert sorted(server.asked[f"load {digest}"] for server in pair) == [0, 1]


def test_a_much_busier_one_is_passed_over(
    pair: tuple[PretendVllm, PretendVllm], before: Before, registry: AdapterRegistry
) -> None:
    engine = before(*pair)
    engine.generate(request())
    (home,) = [server for server in pair if server.adapters]
    (other,) = [server for server in pair if not server.adapters]
    home.faults += ["wait"] * (MUCH_LESS + 1)
    begun = []
    for _ in range(MUCH_LESS + 1):
        begun.append(iter(engine.submit(request())))
        next(begun[-1])
    digest = registry.resolve("sql:1").digest
    assert asked(other, digest) == 0
    engine.generate(request())
    assert asked(other, digest) == 1
    home.go_on.set()
    for chunks in begun:
        assert list(chunks)[-1].done


def test_one_that_dies_loses_no_request_that_had_not_begun(
    pair: tuple[PretendVllm, PretendVllm], before: Before, shared_engine: InferenceEngine
) -> None:
    engine = before(*pair)
    wanted = {model: shared_engine.generate(request(model, 24)).text for model in MODELS}
    for model in MODELS:
        engine.generate(request(model))
    victim = next(server for server in pair if server.adapters)
    started = threading.Semaphore(0)

    def one(number: int) -> bool:
        model = MODELS[number % 3]
        started.release()
        return engine.generate(request(model, 24)).text == wanted[model]

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(one, number) for number in range(48)]
        for _ in range(12):
            started.acquire()
        victim.kill()
        assert all(answer.result(timeout=120) for answer in answers)
    assert engine.status().can_serve and engine.status().running == 0
    for server in pair:
        if server is not victim:
            server.kill()
    with pytest.raises(EngineUnreachableError):
        engine.generate(request())
    assert not engine.status().can_serve
    victim.start()
    assert engine.generate(request("sql:1", 24)).text == wanted["sql:1"]


def test_an_answer_that_has_begun_is_not_begun_again_elsewhere(
    pair: tuple[PretendVllm, PretendVllm], before: Before, shared_engine: InferenceEngine
) -> None:
    """What was told already would be told twice."""
    engine = before(*pair)
    for server in pair:
        server.faults.append("break off")
    heard = ""
    with pytest.raises(EngineUnreachableError):
        for chunk in engine.submit(request(tokens=24)):
            heard += chunk.text
    assert heard and shared_engine.generate(request(tokens=24)).text.startswith(heard)
    assert sum(server.asked[key] for server in pair for key in server.asked if key.startswith("ask sha256")) == 1


def test_one_that_comes_back_is_seen_without_a_request(pair: tuple[PretendVllm, PretendVllm], before: Before) -> None:
    engine = before(*pair)
    pair[0].kill()
    seen = threading.Event()
    while engine.backends[0].healthy:
        seen.wait(0.02)
    pair[0].start()
    while not engine.backends[0].healthy:
        seen.wait(0.02)
    assert all(backend.healthy for backend in engine.backends)


def test_one_that_comes_back_as_another_gets_nothing(pair: tuple[PretendVllm, PretendVllm], before: Before) -> None:
    engine = before(*pair)
    pair[0].kill()
    seen = threading.Event()
    while engine.backends[0].healthy:
        seen.wait(0.02)
    pair[0].base = "another"
    pair[0].start()
    looked = pair[0].asked["look"]
    while pair[0].asked["look"] < looked + 2:
        seen.wait(0.02)
    for _ in range(4):
        engine.generate(request(None))
    assert not engine.backends[0].healthy and pair[0].asked["ask another"] == 0 == pair[0].asked["ask tiny"]


def test_servers_that_are_unlike_are_refused(pretend: Callable[..., PretendVllm], before: Before) -> None:
    with pytest.raises(ConfigurationError, match="different lengths"):
        before(pretend(), pretend(length=256))


def test_an_adapter_is_loaded_and_unloaded_everywhere(pair: tuple[PretendVllm, PretendVllm], before: Before) -> None:
    engine = before(*pair)
    engine.load("sql:1")
    assert all(server.adapters for server in pair) and len(engine.resident()) == 2
    assert engine.unload("sql:1") and not any(server.adapters for server in pair)
    assert not engine.unload("sql:1")
