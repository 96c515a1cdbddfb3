"""Cancelled, late, refused, broken in the middle: the row is free at once and the others never notice."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import (
    EngineClosedError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    ServingError,
)
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from tests.step_gate import StepGate


@pytest.fixture
def gated(make_engine: Any) -> Iterator[tuple[InferenceEngine, StepGate]]:
    engine = make_engine(max_rows=2, max_queue=2)
    gate = StepGate(engine)
    yield engine, gate
    gate.allow(10_000)


def request(prompt: str = "hello", new: int = 50, **options: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, max_new_tokens=new, **options)


def test_cancelled_row_is_free_after_the_step_in_progress(gated: Any, alone: Any) -> None:
    engine, gate = gated
    doomed, other = engine.submit(request()), engine.submit(request("other", new=8))
    gate.allow(2)
    for _ in range(3):
        assert gate.begun.acquire(timeout=30)
    doomed.cancel()
    waiting = engine.submit(request("waiting", new=8))
    gate.allow(1)
    # The step in progress ends; in the next one the row is the waiting request's, whose 7 bytes it reads.
    assert gate.begun.acquire(timeout=30)
    gate.allow(1)
    assert gate.begun.acquire(timeout=30)
    assert gate.sizes[-1] == 1 + len("waiting")
    gate.allow(100)
    with pytest.raises(RequestCancelledError):
        doomed.result()
    with pytest.raises(RequestCancelledError):
        doomed.result()
    assert other.result().token_ids == alone.tokens("other", new=8)
    assert waiting.result().token_ids == alone.tokens("waiting", new=8)


def test_full_queue_refuses_and_recovers(gated: Any) -> None:
    engine, gate = gated
    handles = [engine.submit(request(new=2))]
    assert gate.begun.acquire(timeout=30)
    handles += [engine.submit(request(new=2)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="waiting already"):
        engine.submit(request())
    gate.allow(100)
    assert all(len(handle.result().token_ids) == 2 for handle in handles)
    assert engine.submit(request(new=1)).result().finish_reason == "length"


def test_refused_request_lets_go_of_its_adapter(gated: Any, adapters: dict[str, Path]) -> None:
    engine, gate = gated
    handles = [engine.submit(request(new=1)) for _ in range(4)]
    with pytest.raises(QueueFullError):
        engine.submit(request(adapter=adapters["small"]))
    assert [one.uses for one in engine.resident()] == [0]
    gate.allow(100)
    for handle in handles:
        handle.result()


def test_time_out_in_a_row_and_in_the_queue(gated: Any, adapters: dict[str, Path]) -> None:
    engine, gate = gated
    late = [engine.submit(request(timeout_seconds=1e-4, adapter=adapters["small"])) for _ in range(3)]
    gate.allow(100)
    for handle in late:
        with pytest.raises(RequestTimeoutError, match="ran past its limit"):
            handle.result()
    assert [one.uses for one in engine.resident()] == [0]


def test_exception_inside_a_layer_ends_its_step_and_nothing_else(gated: Any, alone: Any) -> None:
    engine, gate = gated
    handle = engine.submit(request())

    def broken() -> None:
        raise RuntimeError("a layer failed")

    gate.fault = broken
    gate.allow(1)
    with pytest.raises(ServingError, match="a layer failed"):
        handle.result()
    gate.fault = None
    gate.allow(100)
    assert engine.generate(request("again", new=8)).token_ids == alone.tokens("again", new=8)


def test_numbers_that_are_not_finite_do_not_stay_in_the_row(
    make_engine: Any, registered: AdapterRegistry, alone: Any
) -> None:
    """A blend that overflows poisons its own keys and values; the next request in that row must not see them."""
    engine = make_engine(registry=registered)
    with pytest.raises(ServingError, match="not finite"):
        engine.generate(request("a rather long prompt to fill the row", adapter="wide*1e38"))
    results = engine.generate_many([request(prompt, new=8) for prompt in ("x", "a longer one than that")])
    assert [r.token_ids for r in results] == [alone.tokens(p, new=8) for p in ("x", "a longer one than that")]


def test_leaving_a_stream_cancels_it(engine: InferenceEngine, adapters: dict[str, Path]) -> None:
    stream = engine.stream(request(new=400, adapter=adapters["wide"]))
    next(stream)
    stream.close()
    assert engine.unload(adapters["wide"], timeout=30)


def test_close_ends_whatever_runs_or_waits(gated: Any) -> None:
    engine, gate = gated
    handles = [engine.submit(request()) for _ in range(4)]
    assert gate.begun.acquire(timeout=30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.allow(100)
    closing.join(timeout=30)
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result()
    assert not engine.status().can_serve


def test_a_long_prompt_is_read_in_pieces_beside_those_who_write(gated: Any, alone: Any) -> None:
    engine, gate = gated
    writer = engine.submit(request("writer", new=30))
    gate.allow(2)
    for _ in range(3):
        assert gate.begun.acquire(timeout=30)
    long = engine.submit(request("long " * 60, new=4))
    gate.allow(100)
    assert writer.result().token_ids == alone.tokens("writer", new=30)
    assert long.result().token_ids == alone.tokens("long " * 60, new=4)
    assert max(gate.sizes[2:]) == 65, "64 tokens of the prompt and one of the writer"
