"""No request ends the engine, or another request: a failure at every step of its life ends the one it belongs to."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.errors import AdapterHubError, ConfigurationError, EngineClosedError, ResourceError, ServingError
from adapterhub_lite.serving import GenerationRequest, GenerationResult, InferenceEngine
from adapterhub_lite.serving.engine import core as core_module
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from tests.step_gate import StepGate

Make = Callable[..., InferenceEngine]
SHORT = GenerationRequest(prompt="one", max_new_tokens=6, tenant="b")
LONG = GenerationRequest(prompt="y" * 300, max_new_tokens=150, tenant="a")


@pytest.fixture
def fenced(make_engine: Make) -> InferenceEngine:
    return make_engine(native=False, max_rows=4, end_tokens=frozenset())


def failing_once(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, error: BaseException, when: Any = None
) -> None:
    """Make `target.name` raise once, at the first call whose arguments `when` accepts."""
    real, left = getattr(target, name), [error]

    def call(*arguments: Any, **keywords: Any) -> Any:
        if left and (when is None or when(*arguments)):
            raise left.pop()
        return real(*arguments, **keywords)

    monkeypatch.setattr(target, name, call)


def outcomes(engine: InferenceEngine, *requests: GenerationRequest) -> list[GenerationResult | AdapterHubError]:
    handles = [engine.submit(request) for request in requests]
    found: list[GenerationResult | AdapterHubError] = []
    for handle in handles:
        try:
            found.append(handle.result())
        except AdapterHubError as error:
            found.append(error)
    return found


SHORTAGE = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12884901888 bytes.")


@pytest.mark.parametrize("step", ["reserve", "place", "move"])
@pytest.mark.parametrize("error", [SHORTAGE, MemoryError(), ValueError("broken")], ids=lambda one: type(one).__name__)
def test_a_failure_at_admission_ends_that_request_alone(
    fenced: InferenceEngine, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    truth = fenced.generate(SHORT).token_ids
    runner = fenced._runner
    if step == "reserve":
        failing_once(monkeypatch, runner.cache, "reserve", error, when=lambda row, need: need > 400)
    elif step == "place":
        failing_once(monkeypatch, runner.lora, "place", error)
    else:
        failing_once(monkeypatch, runner, "move", error)
    ended = GenerationRequest(prompt="two", max_new_tokens=2, tenant="c")
    found = outcomes(fenced, ended, LONG, SHORT, SHORT)
    failures = [one for one in found if isinstance(one, AdapterHubError)]
    assert len(failures) <= 1
    for failure in failures:
        assert isinstance(failure, ServingError if isinstance(error, ValueError) else ResourceError)
    if step == "reserve":
        assert failures
    assert {one.token_ids for one in found[2:] if isinstance(one, GenerationResult)} == {truth}
    assert fenced.generate(SHORT).token_ids == truth
    assert fenced.status().can_serve and fenced.status().restarts == 0


def test_a_row_that_cannot_be_computed_does_not_end_the_others(
    fenced: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass fails whenever the long prompt is in it; the others are computed without it."""
    truth = [fenced.generate(request).token_ids for request in (SHORT, SHORT)]
    real = fenced._runner.forward

    def forward(step: Any) -> torch.Tensor:
        if int((step.token_ids == step.token_ids[0]).sum()) > 40:
            raise SHORTAGE
        return real(step)

    monkeypatch.setattr(fenced._runner, "forward", forward)
    found = outcomes(fenced, SHORT, LONG, SHORT)
    assert isinstance(found[1], ResourceError)
    assert [one.token_ids for one in (found[0], found[2]) if isinstance(one, GenerationResult)] == truth


@pytest.mark.parametrize("part", ["sampler", "stream", "finish", "listener"])
def test_a_failure_at_sampling_or_handing_out_ends_that_request_alone(fenced: InferenceEngine, part: str) -> None:
    truth = fenced.generate(SHORT).token_ids
    gate = StepGate(fenced)  # nothing is computed until the part is broken
    broken, other = fenced.submit(LONG), fenced.submit(SHORT)

    def fail(*_: Any) -> Any:
        raise RuntimeError("broken")

    sequence = broken._sequence
    if part == "sampler":
        sequence.sampler.choose = fail  # type: ignore[method-assign]
    elif part == "stream":
        sequence.stream.push = fail  # type: ignore[method-assign]
    elif part == "finish":
        sequence.stream.finish = fail  # type: ignore[method-assign]
    else:
        broken.listen(fail)
    gate.allow(10_000)
    if part != "listener":
        with pytest.raises(ServingError, match="broken"):
            broken.result()
    assert other.result().token_ids == truth == fenced.generate(SHORT).token_ids
    assert fenced.status().can_serve


def test_a_failure_of_the_loop_begins_anew_once_and_ends_at_the_second(
    fenced: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = fenced.generate(SHORT).token_ids
    scheduler = fenced._core._scheduler
    failing_once(monkeypatch, scheduler, "plan", KeyError("plan"))
    with pytest.raises(ServingError, match="began anew"):
        fenced.generate(SHORT)
    assert fenced.generate(SHORT).token_ids == truth
    assert (fenced.status().restarts, fenced.ended()) == (1, False)
    failing_once(monkeypatch, scheduler, "compact", KeyError("compact"))
    with pytest.raises((ServingError, EngineClosedError)):
        fenced.generate(SHORT)
    fenced._core._thread.join()
    assert fenced.ended() and not fenced.status().can_serve
    with pytest.raises(EngineClosedError):
        fenced.generate(SHORT)


def test_failures_that_lie_far_apart_are_forgiven(fenced: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "FORGIVEN_SECONDS", 0.0)
    for _ in range(3):
        failing_once(monkeypatch, fenced._core._scheduler, "plan", KeyError("plan"))
        with pytest.raises(ServingError):
            fenced.generate(SHORT)
    assert fenced.generate(SHORT).finish_reason == "length"


@pytest.fixture(scope="module")
def long_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a context of 8,192 tokens."""
    folder = tmp_path_factory.mktemp("long") / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_keys_and_values_have_a_budget_that_is_granted_before_a_row(long_base: Path) -> None:
    options: Any = {"device": "cpu", "native": False, "max_rows": 4, "end_tokens": frozenset()}
    with InferenceEngine.from_base(long_base, **options) as engine:
        each = engine._runner.cache.token_bytes  # type: ignore[union-attr]
        truth = engine.generate(SHORT).token_ids
        long = GenerationRequest(prompt="z" * 2500, max_new_tokens=3)
        whole = engine.generate(long).token_ids
    budget = 3000 * each * 3 // 2
    with InferenceEngine.from_base(long_base, cache_memory=budget, **options) as engine:
        with pytest.raises(ConfigurationError, match=f"{budget:,} bytes"):
            engine.generate(GenerationRequest(prompt="z" * 4000, max_new_tokens=3))
        most = 0

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, engine._runner.cache.nbytes)

        done = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            found = outcomes(engine, SHORT, long, SHORT, long, SHORT)
        finally:
            done.set()
            watcher.join()
        assert [one.token_ids for one in found if isinstance(one, GenerationResult)] == [
            truth,
            whole,
            truth,
            whole,
            truth,
        ]
        assert most <= budget
    with pytest.raises(ConfigurationError, match="not enough"):
        InferenceEngine.from_base(long_base, cache_memory=100, **options)


def test_a_cache_whose_growth_fails_half_way_still_holds_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer: where the memory ends at the second layer, every row reads what it wrote."""
    from adapterhub_lite.serving.model.packed_step import RowSlice, pack

    cache = KVCache(3, 2)
    generator = torch.Generator().manual_seed(0)

    def write(slices: list[RowSlice]) -> None:
        cache.begin(pack(slices))
        count = sum(len(part.token_ids) for part in slices)
        for layer in range(3):
            key = torch.randn(count, 1, 4, generator=generator)
            cache.attend(layer, torch.randn(count, 2, 4, generator=generator), key, key, None)

    write([RowSlice(0, 0, [1] * 20), RowSlice(1, 0, [1] * 5)])

    def held() -> list[torch.Tensor]:
        rows = [slice(cache.region(row).begin, cache.region(row).begin + length) for row, length in ((0, 20), (1, 5))]
        return [tensor[row].clone() for tensor in cache._keys if tensor is not None for row in rows]

    before = held()
    real, calls = torch.Tensor.new_empty, [0]

    def short_of_memory(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise SHORTAGE
        return real(self, *shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", short_of_memory)
        with pytest.raises(RuntimeError, match="allocate"):
            cache.reserve(1, 5000)
    torch.testing.assert_close(held(), before, rtol=0, atol=0)
    write([RowSlice(0, 20, [1]), RowSlice(1, 5, [1])])
    cache.reserve(1, 5000)
    torch.testing.assert_close(held(), before, rtol=0, atol=0)
    write([RowSlice(0, 21, [1]), RowSlice(1, 6, [1])])
    assert {tensor.shape[0] for tensor in cache._keys if tensor is not None} == {cache.places}
