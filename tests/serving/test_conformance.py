"""What every engine behind the server must do: one test for the embedded engine, replicas in Ray, and vLLM (pretended)."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import AdapterHubError, ConfigurationError, RequestCancelledError, RequestTimeoutError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, GenerationResult, InferenceEngine
from adapterhub_lite.serving.adapters.sources import RegistrySource
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings
from tests.serving.vllm.pretend import PretendVllm
from tests.step_gate import StepGate

MODELS = (None, "sql:1", "sql:2", "event", "sql:1*0.5+event*2")
ASKED: tuple[dict[str, Any], ...] = (
    {}, {"logprobs": 3}, {"prompt_logprobs": 2}, {"max_new_tokens": 0}, {"labels": ("yes", "no")}, {"regex": "[a-c]{3}"},
    {"choices": ("left", "right")}, {"stop": ("h",)}, {"min_tokens": 12, "logprobs": 0}, {"logit_bias": {70: 100.0}},
    {"allowed_token_ids": (70, 71)}, {"repetition_penalty": 2.0, "presence_penalty": 1.0}, {"truncate_prompt_tokens": 3},
)  # fmt: skip


@pytest.fixture(scope="module")
def embedded(shared_engine: InferenceEngine) -> InferenceEngine:
    return shared_engine


@pytest.fixture(scope="module")
def computing(tiny_base: Path) -> Iterator[InferenceEngine]:
    """What the pretend vLLM computes with."""
    with InferenceEngine.from_base(tiny_base, device="cpu", max_rows=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def vllm(registry: AdapterRegistry, tiny_base: Path, computing: InferenceEngine) -> Iterator[Engine]:
    from adapterhub_lite.serving.vllm.engine import VllmEngine

    base, pretend = resolve_base(tiny_base), PretendVllm(computing)
    with VllmEngine(base, [pretend.url], RegistrySource(registry, base)) as engine:
        yield engine
    pretend.close()


@pytest.fixture(scope="module")
def replicas(registry: AdapterRegistry, tiny_base: Path) -> Iterator[Engine]:
    pytest.importorskip("ray.serve", reason="Ray is not installed: see `adapterhub-lite doctor`")
    from adapterhub_lite.serving.cluster.replicas import ClusterEngine
    from adapterhub_lite.serving.cluster.settings import ClusterSettings

    settings = ClusterSettings(port=0, cluster=True, replicas=2, replica_cpus=0.5)
    with ClusterEngine(tiny_base, settings, home=registry.home, device="cpu", max_rows=4) as engine:
        yield engine


RAY = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=["embedded", "vllm", pytest.param("replicas", marks=RAY)])
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def gate(request: pytest.FixtureRequest, engine: Engine) -> Iterator[StepGate | None]:
    """Before the steps of whatever computes; None where that is in other processes."""
    computes = {"embedded": "embedded", "vllm": "computing"}.get(request.node.callspec.params["engine"])
    if computes is None:
        yield None
        return
    gate = StepGate(request.getfixturevalue(computes))
    yield gate
    gate.remove()


def read(engine: Engine, request: GenerationRequest, *, whole: bool = False) -> tuple[str, GenerationResult]:
    """The text of the chunks and the result of a request, as a server reads them."""
    pieces: list[str] = []
    ended = threading.Event()
    last: list[Any] = []

    def listen(item: Any) -> None:
        if isinstance(item, BaseException) or item.done:
            last.append(item)
        if not isinstance(item, BaseException):
            pieces.append(item.text)
        if last:
            ended.set()

    engine.submit(request).listen(listen, whole=whole)
    assert ended.wait(120)
    if isinstance(last[0], BaseException):
        raise last[0]
    return "".join(pieces), last[0].result


def close(one: Any, other: Any) -> None:
    """Log-probabilities are the same to rounding; everything else of them is the same."""
    if one is None or other is None:
        assert one is other
        return
    for a, b in zip(one, other, strict=True):
        assert a.token_id == b.token_id and [token for token, _ in a.top] == [token for token, _ in b.top]
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-4)


@pytest.mark.parametrize("more", ASKED, ids=lambda more: "-".join(more) or "plain")
def test_answers_are_those_of_the_embedded_engine(
    engine: Engine, shared_engine: InferenceEngine, registry: AdapterRegistry, more: dict[str, Any]
) -> None:
    for model in MODELS:
        request = GenerationRequest(**{"prompt": "select the", "adapter": model, "max_new_tokens": 12, **more})
        wanted = shared_engine.generate(request)
        for whole in (False, True):
            text, found = read(engine, request, whole=whole)
            assert found.text == wanted.text and (whole or text == wanted.text)
            for name in ("token_ids", "finish_reason", "adapter_digest", "base_fingerprint"):
                assert getattr(found, name) == getattr(wanted, name), (model, name)
            assert found.usage.prompt_tokens == wanted.usage.prompt_tokens
            close(found.logprobs, wanted.logprobs)
            close(found.prompt_logprobs, wanted.prompt_logprobs)
            if wanted.label_logprobs is not None:
                assert found.label_logprobs == pytest.approx(wanted.label_logprobs, abs=1e-4)
    assert registry.resolve("sql:1").digest in {one.digest for one in engine.resident()}


def test_a_chat_is_laid_out_by_the_template(engine: Engine, shared_engine: InferenceEngine) -> None:
    messages = [{"role": "user", "content": "how many?"}]
    request = GenerationRequest(messages=messages, adapter="sql@prod", max_new_tokens=8)
    assert engine.encode(request) == shared_engine.encode(request)
    assert read(engine, request)[1].token_ids == shared_engine.generate(request).token_ids


def test_what_cannot_be_is_refused(engine: Engine) -> None:
    for asked, reason in (
        ({"prompt": "x" * 600}, "at most"),
        ({"prompt": "x", "adapter": "nobody"}, "nobody"),
        ({"prompt": "x", "regex": "["}, "regex"),
        ({"prompt": "x", "logit_bias": {5000: 1.0}}, "5000"),
        ({"prompt": "x", "labels": ("a", "ab")}, "beginning of"),
    ):
        with pytest.raises(AdapterHubError, match=reason):
            read(engine, GenerationRequest(**asked))
    with pytest.raises(AdapterHubError, match="nobody"):
        engine.load("nobody")


def test_a_cancelled_request_ends_and_leaves_nothing(engine: Engine, gate: StepGate | None) -> None:
    heard: list[Any] = []
    ended, begun = threading.Event(), threading.Event()

    def listen(item: Any) -> None:
        heard.append(item)
        begun.set()
        if isinstance(item, BaseException) or item.done:
            ended.set()

    answer = engine.submit(GenerationRequest(prompt="x", adapter="sql:1", max_new_tokens=400, ignore_eos=True))
    if gate is not None:
        gate.allow(20)  # far fewer than the answer takes
    answer.listen(listen)
    assert begun.wait(60)
    answer.cancel()
    if gate is not None:
        gate.remove()
    assert ended.wait(60) and isinstance(heard[-1], RequestCancelledError)
    # Taken out of memory, which waits for whoever uses it.
    assert engine.unload("sql:1") and not engine.unload("sql:1")
    assert read(engine, GenerationRequest(prompt="x", adapter="sql:1", max_new_tokens=4))[1].adapter == "sql:1"


def test_one_that_is_cancelled_at_once_ends_too(engine: Engine, gate: StepGate | None) -> None:
    for number in range(8):
        heard: list[Any] = []
        ended = threading.Event()

        def listen(item: Any, heard: list[Any] = heard, ended: threading.Event = ended) -> None:
            heard.append(item)
            if isinstance(item, BaseException) or item.done:
                ended.set()

        answer = engine.submit(GenerationRequest(prompt="x", adapter="sql:1", max_new_tokens=400, ignore_eos=True))
        if number % 2:
            answer.cancel()
        answer.listen(listen)
        answer.cancel()
        if gate is not None:
            gate.allow(1)  # the one it may be in
        assert ended.wait(60) and isinstance(heard[-1], RequestCancelledError)
    assert engine.unload("sql:1")


def test_a_request_has_its_own_limit_of_time(engine: Engine) -> None:
    # Shorter than the first step, however fast the machine is.
    with pytest.raises(RequestTimeoutError):
        read(engine, GenerationRequest(prompt="x", max_new_tokens=400, ignore_eos=True, timeout_seconds=1e-4))


def test_splits_are_exact_and_stop(engine: Engine, registry: AdapterRegistry) -> None:
    assert engine.start_split("sql:1", "sql:2", share=0.25).name == "sql:2"
    try:
        assert engine.splits() == {"sql:1": ("sql:2", 0.25)}
        assert [engine.choose("sql:1") for _ in range(8)].count("sql:2") == 2
    finally:
        assert engine.stop_split("sql:1") and not engine.stop_split("sql:1")
    with pytest.raises(ConfigurationError):
        engine.start_split("sql:1", "sql:2", share=2.0)


def test_a_server_before_it_gives_receipts_while_an_alias_moves(
    engine: Engine, registry: AdapterRegistry, shared_engine: InferenceEngine
) -> None:
    wanted = {
        registry.resolve(name).digest: shared_engine.generate(
            GenerationRequest(prompt="select the", adapter=name, max_new_tokens=8)
        ).text
        for name in ("sql:1", "sql:2")
    }
    stop, moved = threading.Event(), threading.Event()

    def move() -> None:
        version = 1
        while not stop.is_set():
            version = 3 - version
            registry.set_alias("sql", "moving", version=version)
            moved.set()

    registry.set_alias("sql", "moving", version=1)
    mover = threading.Thread(target=move)
    mover.start()
    try:
        with ApiServer(engine, registry, ServerSettings(port=0)) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

            def ask(number: int) -> tuple[str, str]:
                body: Any = {"model": "sql@moving", "prompt": "select the", "max_tokens": 8, "temperature": 0}
                if number % 2:
                    pieces = list(client.completions.create(**body, stream=True))
                    return pieces[0].receipt["adapter_digest"], "".join(one.choices[0].text for one in pieces)
                answer: Any = client.completions.create(**body)
                return answer.receipt["adapter_digest"], answer.choices[0].text

            with client, ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, range(24)))
                # However long a move takes beside the requests: a few more moves where these were all before one.
                for _ in range(10):
                    moved.clear()
                    assert moved.wait(60)
                    answers += pool.map(ask, range(24))
                    if {digest for digest, _ in answers} == set(wanted):
                        break
            assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 200
    finally:
        stop.set()
        mover.join()
        registry.remove_alias("sql", "moving")
    assert all(text == wanted[digest] for digest, text in answers)
    assert {digest for digest, _ in answers} == set(wanted), "the alias never moved under the requests"


def test_it_says_how_it_does(engine: Engine) -> None:
    status = engine.status()
    assert status.can_serve and not engine.ended() and status.running == 0 and status.tokens > 0
    assert status.max_length == 512 and status.loads > 0
