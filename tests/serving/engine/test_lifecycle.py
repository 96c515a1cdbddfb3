"""Loading, unloading, moving aliases and splits while requests run: the right version, nothing freed too early."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import AdapterRejectedError, BaseMismatchError, ConfigurationError, QueueFullError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.slots import AdapterSlots, SlotRequest
from adapterhub_lite.serving.adapters.weights import AdapterWeights

ASK = "which version are you"


@pytest.fixture
def registry(home: Path, tiny_base: Path, adapters: dict[str, Path]) -> AdapterRegistry:
    """Versions sql:1 and sql:2, of which sql@prod is the first, and event:1."""
    registry = AdapterRegistry(home)
    base = resolve_base(tiny_base)
    for folder, name in (("small", "sql"), ("wide", "sql"), ("mlp", "event")):
        registry.add(adapters[folder], name, base=base)
    registry.set_alias("sql", "prod", version=1)
    return registry


@pytest.fixture
def engine(make_engine: Callable[..., InferenceEngine], registry: AdapterRegistry) -> InferenceEngine:
    return make_engine(registry=registry)


def ask(engine: InferenceEngine, adapter: str | None, new: int = 8) -> Any:
    return engine.generate(GenerationRequest(prompt=ASK, adapter=adapter, max_new_tokens=new))


def test_registry_versions_answer_like_peft(
    engine: InferenceEngine, alone: Any, adapters: dict[str, Path], registry: AdapterRegistry
) -> None:
    assert ask(engine, "sql@prod").token_ids == alone.tokens(ASK, adapters["small"], new=8)
    assert ask(engine, "sql").token_ids == alone.tokens(ASK, adapters["wide"], new=8)
    blend = ask(engine, "sql:2*0.7+event:1*0.3")
    assert blend.token_ids == alone.tokens(ASK, (adapters["wide"], 0.7), (adapters["mlp"], 0.3), new=8)
    assert blend.adapter == "sql:2*0.7+event:1*0.3"
    digests = [registry.resolve(name).digest for name in ("sql:2", "event:1")]
    assert blend.adapter_digest == f"{digests[0]}*0.7+{digests[1]}*0.3"


def test_a_moved_alias_is_for_new_requests_only(
    engine: InferenceEngine, registry: AdapterRegistry, alone: Any, adapters: dict[str, Path]
) -> None:
    stream = engine.stream(GenerationRequest(prompt=ASK, adapter="sql@prod", max_new_tokens=40))
    next(stream)
    registry.set_alias("sql", "prod", version=2)
    assert ask(engine, "sql@prod").adapter == "sql:2"
    last = list(stream)[-1].result
    assert last is not None and last.adapter == "sql:1"
    assert last.token_ids == alone.tokens(ASK, adapters["small"], new=40)
    registry.rollback("sql", "prod")
    assert ask(engine, "sql@prod").adapter == "sql:1"


def test_probes_gets_its_exact_share_and_ends_at_once(engine: InferenceEngine) -> None:
    engine.start_split("sql@prod", "sql:2", share=0.1)
    answered = [ask(engine, "sql@prod", new=1).adapter for _ in range(20)]
    assert answered.count("sql:2") == 2 and answered.count("sql:1") == 18
    assert engine.status().splits == {"sql@prod": ("sql:2", 0.1)}
    assert engine.stop_split("sql@prod")
    assert {ask(engine, "sql@prod", new=1).adapter for _ in range(10)} == {"sql:1"}
    with pytest.raises(ConfigurationError, match=r"share of a split is 1\.5"):
        engine.start_split("sql@prod", "sql:2", share=1.5)


def test_unload_waits_for_those_who_use_it(engine: InferenceEngine, alone: Any, adapters: dict[str, Path]) -> None:
    stream = engine.stream(GenerationRequest(prompt=ASK, adapter="sql:1", max_new_tokens=60))
    next(stream)
    first = engine.resident()[0]
    assert engine.unload("sql:1", timeout=0) and engine.resident() == []
    again = ask(engine, "sql:1")
    assert engine.resident()[0].load_id != first.load_id
    last = list(stream)[-1].result
    assert last is not None and last.token_ids == alone.tokens(ASK, adapters["small"], new=60)
    assert again.token_ids == last.token_ids[:8]


def test_an_adapter_for_another_base_is_refused(
    tiny_base: Path, registry: AdapterRegistry, byte_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.model.norm.weight.data += 0.5
    model.save_pretrained(tmp_path / "other")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    with InferenceEngine.from_base(tmp_path / "other", registry=registry, device="cpu") as engine:
        with pytest.raises(BaseMismatchError, match="sql:1 was made for the base"):
            ask(engine, "sql:1")
        assert engine.resident() == []


def test_least_recently_used_goes_and_pins_stay(make_engine: Any, registry: AdapterRegistry) -> None:
    engine = make_engine(registry=registry, max_slots=2)
    engine.load("sql:1", pin=True)
    ask(engine, "sql:2")
    ask(engine, "event")
    assert [one.name for one in engine.resident()] == ["sql:1", "event:1"]
    assert (engine.tier("sql:2"), engine.tier("event")) == ("host", "resident")
    engine.pin("event")
    with pytest.raises(QueueFullError, match="pins"):
        ask(engine, "sql:2")
    engine.pin("event", False)
    assert ask(engine, "sql:2").adapter == "sql:2"
    assert engine.status().evictions == 2


def test_prefetch_brings_it_in_before_it_is_asked_for(engine: InferenceEngine) -> None:
    assert engine.tier("event") == "disk"
    assert engine.prefetch("event").result().name == "event:1"
    assert engine.tier("event") == "resident"
    assert engine.unload("event") and engine.tier("event") == "disk"


def test_exhausted_slots_are_waited_for(make_engine: Any, registry: AdapterRegistry) -> None:
    engine = make_engine(registry=registry, max_slots=1)
    stream = engine.stream(GenerationRequest(prompt=ASK, adapter="sql:1", max_new_tokens=100))
    next(stream)
    assert ask(engine, "sql:2").adapter == "sql:2"
    with pytest.raises(QueueFullError, match="needs 2 adapter slots, there are 1"):
        ask(engine, "sql:1*0.5+sql:2*0.5")


def _weights() -> AdapterWeights:
    return AdapterWeights({}, rank=1, modules=1)


def test_two_loads_of_one_name_are_one_load() -> None:
    slots, loading, go = AdapterSlots(2), threading.Event(), threading.Event()
    calls = []

    def load() -> AdapterWeights:
        calls.append(1)
        loading.set()
        assert go.wait(20)
        return _weights()

    got: list[Any] = []
    wanted = [SlotRequest("d", "one", load)]
    threads = [threading.Thread(target=lambda: got.append(slots.acquire(wanted)[0][0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert loading.wait(20)
    go.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len({id(entry) for entry in got}) == 1 and got[0].uses == 4


def test_a_failed_load_is_told_to_all_and_leaves_nothing() -> None:
    slots = AdapterSlots(1)

    def load() -> AdapterWeights:
        raise AdapterRejectedError("one", ["broken"])

    for _ in range(2):
        with pytest.raises(AdapterRejectedError, match="broken"):
            slots.acquire([SlotRequest("d", "one", load)])
    assert slots.resident() == []
    assert slots.acquire([SlotRequest("d", "one", _weights)])[0][0].uses == 1


def test_blends_take_their_slots_in_one_step() -> None:
    """Two blends that share no slot and want two each: with slots taken one by one they would wait for each other."""
    slots = AdapterSlots(2)
    done: list[int] = []

    def blend(first: str, second: str) -> None:
        for _ in range(50):
            entries, _ = slots.acquire(
                [SlotRequest(first, first, _weights), SlotRequest(second, second, _weights)], timeout=60
            )
            for entry in entries:
                slots.release(entry)
        done.append(1)

    threads = [threading.Thread(target=blend, args=pair) for pair in (("a", "b"), ("c", "d"), ("b", "c"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3


def test_what_is_in_use_is_never_evicted() -> None:
    slots = AdapterSlots(1)
    (held,), _ = slots.acquire([SlotRequest("a", "a", _weights)])
    with pytest.raises(QueueFullError, match="in use"):
        slots.acquire([SlotRequest("b", "b", _weights)], timeout=0)
    assert [(one.name, one.uses) for one in slots.resident()] == [("a", 1)]
    slots.release(held)
    assert slots.acquire([SlotRequest("b", "b", _weights)], timeout=0)[0][0].uses == 1
    assert slots.evictions == 1
