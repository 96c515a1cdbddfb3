"""A base is served only after the engine reproduced its own `generate`; otherwise another way, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.model import proof
from adapterhub_lite.serving.model.forward_llama import LlamaForward
from adapterhub_lite.serving.model.forward_rows import RowForward
from adapterhub_lite.serving.model.kv_cache import KVCache
from adapterhub_lite.serving.model.runner import ForwardKind
from tests.serving.model.families import build


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A base with a layer of short convolutions, whose windows no cache of keys and values holds."""
    return build("lfm2", tmp_path_factory.mktemp("lfm2"), byte_tokenizer)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A base with a sliding window."""
    return build("mistral", tmp_path_factory.mktemp("mistral"), byte_tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_base_is_proven_in_the_fastest_way(tiny_base: Path, dtype: torch.dtype) -> None:
    _, verdict = proof.prove(load_base_model(tiny_base, dtype=dtype), rows=4)
    assert (verdict.kind, verdict.reasons) == ("lean", ())
    assert verdict.difference <= verdict.tolerance


def test_every_way_is_equal_on_a_plain_base(tiny_base: Path) -> None:
    for kind in reversed(ForwardKind):  # the lean pass takes the weights, so it is last
        model = load_base_model(tiny_base, dtype=torch.float32)
        _, verdict = proof.prove(model, rows=4, kinds=[kind])
        assert verdict.kind == kind and verdict.difference < 1e-5


def test_a_state_that_a_batch_does_not_keep_is_kept_row_by_row(lfm2: Path, byte_tokenizer: Any) -> None:
    with InferenceEngine.from_base(lfm2, end_tokens=frozenset()) as engine:
        asked = [GenerationRequest(prompt, max_new_tokens=8) for prompt in ("one", "a longer one", "the third")]
        answers = engine.generate_many(asked)
        status = engine.status()
    assert status.forward == "row by row" and "packed: the base keeps more than keys and values" in status.reasons[0]
    model: Any = load_base_model(lfm2)
    for request, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([byte_tokenizer.encode(request.prompt)])
        own = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert list(answer.token_ids) == own[0, ids.shape[1] :].tolist()


def test_a_window_that_is_forgotten_is_seen(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert proof.prove(load_base_model(mistral), rows=4)[1].kind == "packed"
    own = KVCache.attend

    def everything(self: KVCache, *arguments: Any, **options: Any) -> torch.Tensor:
        return own(self, *arguments[:5], None, **options)

    monkeypatch.setattr(KVCache, "attend", everything)
    verdict = proof.prove(load_base_model(mistral), rows=4)[1]
    assert verdict.kind == "row by row" and verdict.reasons[0].startswith("packed: logits differ by")


def test_a_window_of_thousands_is_narrowed_for_the_proof_only(mistral: Path) -> None:
    model = load_base_model(mistral)
    model.config.sliding_window = 4096
    with proof.narrow_windows(model):
        assert model.config.sliding_window == proof.NARROW
    assert model.config.sliding_window == 4096


def test_a_base_that_nothing_reproduces_is_refused_with_what_differs(
    tiny_base: Path, lfm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForward, "_rms", lambda self, x, weight: x * weight)
    with pytest.raises(
        ConfigurationError, match=r"LlamaForCausalLM is not served: .*lean: logits differ by .* rounding"
    ):
        proof.prove(load_base_model(tiny_base), rows=4)
    monkeypatch.setattr(RowForward, "_row", lambda self, row, position, ids: torch.zeros(300))
    with pytest.raises(ConfigurationError, match=r"packed: the base keeps .*row by row: .*recomputed: "):
        proof.prove(load_base_model(lfm2), rows=4)


def test_an_adapter_that_is_not_added_is_seen(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub_lite.serving.model.lora_torch import TorchLora

    monkeypatch.setattr(TorchLora, "add", lambda self, group, layer, x, y: y)
    verdict = proof.prove(load_base_model(mistral), rows=4, native=False)[1]
    assert verdict.kind == "row by row"


def test_a_base_that_transformers_cannot_generate_with_is_refused(
    mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base_model(mistral)
    monkeypatch.setattr(model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigurationError, match="transformers' own generate fails on it, with ZeroDivisionError"):
        proof.prove(model, rows=4)


def test_a_verdict_is_kept_in_the_home(mistral: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_verdicts", {})
    with InferenceEngine.from_base(mistral) as engine:
        first = engine.status()
    assert len(list((home / "verdicts").iterdir())) == 1
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "prove", lambda *_, **__: pytest.fail("proven again"))
    with InferenceEngine.from_base(mistral) as engine:
        assert (engine.status().forward, engine.status().difference) == (first.forward, first.difference)
    file = next((home / "verdicts").iterdir())
    file.write_text("{")
    assert proof.read_verdict(file) is None
