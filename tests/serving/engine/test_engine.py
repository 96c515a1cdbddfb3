"""The engine against plain PEFT alone: whatever shares the batch, every row answers as if it were by itself."""

from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import (
    AdapterRejectedError,
    ConfigurationError,
    EngineClosedError,
    ResourceError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine

PROMPTS = ["one", "a longer prompt, of many more bytes than the others have", "x", "SELECT name FROM"]


def test_base_alone_answers_like_transformers(engine: InferenceEngine, alone: Any) -> None:
    result = engine.generate(GenerationRequest(prompt="hello", max_new_tokens=12))
    assert result.token_ids == alone.tokens("hello")
    assert result.adapter is None and result.adapter_digest is None
    assert result.usage.prompt_tokens == 5


def test_mixed_batch_answers_each_row_as_if_alone(
    engine: InferenceEngine, alone: Any, adapters: dict[str, Path]
) -> None:
    cases: list[tuple[str, Path | None]] = [(p, a) for p in PROMPTS for a in (None, *adapters.values())]
    results = engine.generate_many([GenerationRequest(prompt=p, adapter=a, max_new_tokens=12) for p, a in cases])
    for (prompt, adapter), result in zip(cases, results, strict=True):
        assert result.token_ids == alone.tokens(prompt, *([adapter] if adapter else [])), (prompt, adapter)


def test_blend_is_the_exact_weighted_sum(
    make_engine: Any, registered: AdapterRegistry, alone: Any, adapters: dict[str, Path]
) -> None:
    request = GenerationRequest(prompt="blend", adapter="small*0.7+wide*-0.3", max_new_tokens=12)
    result = make_engine(registry=registered).generate(request)
    assert result.token_ids == alone.tokens("blend", (adapters["small"], 0.7), (adapters["wide"], -0.3))
    assert result.adapter == "small:1*0.7+wide:1*-0.3"
    assert result.adapter_digest is not None and result.adapter_digest.count("sha256:") == 2


def test_a_string_is_never_a_path(
    engine: InferenceEngine,
    make_engine: Any,
    registered: AdapterRegistry,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A folder that stands where the process runs is not what a name means, whoever put it there."""
    monkeypatch.chdir(tmp_path)
    for name in ("small", "nobody"):
        Path(name).symlink_to(adapters["mlp"])
    with pytest.raises(UnknownNameError, match=r"pathlib\.Path"):
        engine.generate(GenerationRequest(prompt="a", adapter="small"))
    with_names = make_engine(registry=registered)
    result = with_names.generate(GenerationRequest(prompt="a", adapter="small", max_new_tokens=2))
    assert result.adapter_digest == registered.resolve("small").digest
    for text in ("nobody", str(tmp_path / "small"), "./small", "small/../small"):
        with pytest.raises(UsageError):
            with_names.generate(GenerationRequest(prompt="a", adapter=text))
        with pytest.raises(UsageError):
            with_names.load(text)


def test_chat_template_of_the_base(engine: InferenceEngine, alone: Any) -> None:
    result = engine.generate(GenerationRequest(messages=[{"role": "user", "content": "hi"}], max_new_tokens=8))
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert result.token_ids == alone.tokens(prompt, new=8)


def test_stream_gives_the_same_text_in_pieces(engine: InferenceEngine, adapters: dict[str, Path]) -> None:
    request = GenerationRequest(prompt="stream", adapter=adapters["wide"], max_new_tokens=16)
    chunks = list(engine.stream(request))
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].result is not None
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].result.text == engine.generate(request).text


def test_every_result_is_a_receipt(engine: InferenceEngine, adapters: dict[str, Path], tiny_base: Path) -> None:
    from adapterhub_lite.bases import base_fingerprint

    first = engine.generate(GenerationRequest(prompt="a", adapter=adapters["small"], max_new_tokens=2))
    other = engine.generate(GenerationRequest(prompt="a", adapter=adapters["wide"], max_new_tokens=2))
    assert first.base_fingerprint == base_fingerprint(tiny_base)
    assert first.adapter_digest != other.adapter_digest
    timings = other.timings
    assert 0 <= timings.queue_seconds <= timings.first_token_seconds <= timings.total_seconds
    assert timings.switch_seconds > 0


def test_load_resident_unload(engine: InferenceEngine, adapters: dict[str, Path]) -> None:
    loaded = engine.load(adapters["small"], pin=True)
    assert loaded.pinned and engine.resident() == [loaded] and loaded.modules == 6
    assert engine.unload(adapters["small"]) and engine.resident() == []
    assert not engine.unload(adapters["small"])
    assert engine.load(adapters["small"]).load_id != loaded.load_id


def test_base_weights_hash_the_same_after_serving(engine: InferenceEngine, adapters: dict[str, Path]) -> None:
    before = engine.base_digest()
    engine.generate_many([GenerationRequest(prompt=p, adapter=a) for p in PROMPTS for a in adapters.values()])
    assert engine.base_digest() == before


def test_what_cannot_be_served_is_said_at_once(engine: InferenceEngine, make_adapter: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError):
        engine.generate(GenerationRequest(prompt="a", adapter="nobody"))
    with pytest.raises(AdapterRejectedError, match="rank 32"):
        engine.generate(GenerationRequest(prompt="a", adapter=make_adapter(9, rank=32)))
    with pytest.raises(ConfigurationError, match="at most 511"):
        engine.generate(GenerationRequest(prompt="a" * 10_000))
    with pytest.raises(ConfigurationError, match="empty"):
        engine.generate(GenerationRequest(prompt=""))


def test_an_adapter_that_memory_is_too_short_for_is_not_loaded(
    tiny_base: Path, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InferenceEngine.from_base(tiny_base, device="cpu") as engine:
        adapter = make_adapter(9)
        monkeypatch.setattr("adapterhub_lite.serving.engine.engine.free_memory", lambda _: 1000)
        with pytest.raises(ResourceError, match="1,000 are free"):
            engine.load(adapter)
        monkeypatch.undo()
        assert engine.load(adapter).modules


def test_closed_engine_says_so(engine: InferenceEngine) -> None:
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.generate(GenerationRequest(prompt="a"))
