"""A base is served only after the engine reproduced its own `generate`; otherwise another way, or a refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.model import forward_native, proof
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.cache.row_states import RowStates
from adapterhub_lite.serving.model.elementwise import Turn
from adapterhub_lite.serving.model.forward_lean import LeanForward
from adapterhub_lite.serving.model.forward_native import NativeForward
from adapterhub_lite.serving.model.forward_rows import RowForward
from adapterhub_lite.serving.model.packed_step import Step
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
    for kind in ForwardKind:
        model = load_base_model(tiny_base, dtype=torch.float32)
        _, verdict = proof.prove(model, rows=4, kinds=[kind])
        assert verdict.kind == kind and verdict.difference < 1e-5


def test_a_state_that_is_not_keys_and_values_is_kept_beside_them(lfm2: Path, byte_tokenizer: Any) -> None:
    with InferenceEngine.from_base(lfm2, end_tokens=frozenset()) as engine:
        asked = [GenerationRequest(prompt, max_new_tokens=8) for prompt in ("one", "a longer one", "the third")]
        answers = engine.generate_many(asked)
        status = engine.status()
    assert status.forward == "stacked" and "packed: the base keeps more than this way does" in status.reasons[0]
    model: Any = load_base_model(lfm2)
    for request, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([byte_tokenizer.encode(request.prompt)])
        own = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert list(answer.token_ids) == own[0, ids.shape[1] :].tolist()


def test_a_window_that_is_forgotten_is_seen(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert proof.prove(load_base_model(mistral), rows=4)[1].kind == "lean"
    own = KVCache.look

    def everything(self: KVCache, *arguments: Any, **options: Any) -> torch.Tensor:
        return own(self, *arguments[:3], None, **options)

    monkeypatch.setattr(KVCache, "look", everything)
    fill = NativeForward._fill

    def everything_in_c(self: NativeForward, index: int, layer: Any, positions: int) -> object:
        room = fill(self, index, layer, positions)
        layer.window = 0
        return room

    monkeypatch.setattr(NativeForward, "_fill", everything_in_c)
    model = load_base_model(mistral)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verdict = proof.prove(model, rows=4)[1]
    assert verdict.kind == "row by row"
    assert [reason.partition(" by")[0] for reason in verdict.reasons] == [
        "lean: logits differ",
        "packed: logits differ",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_window_of_thousands_is_narrowed_for_the_proof_only(mistral: Path) -> None:
    model = load_base_model(mistral)
    model.config.sliding_window = 4096
    with proof.narrow_windows(model):
        assert model.config.sliding_window == proof.NARROW
    assert model.config.sliding_window == 4096


def test_a_base_that_nothing_reproduces_is_refused_with_what_differs(
    tiny_base: Path, lfm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "look", lambda self, query, *_, **__: torch.zeros_like(query))
    monkeypatch.setattr(RowForward, "_row", lambda self, row, position, ids, count: torch.zeros(1, 300))
    monkeypatch.setattr(
        NativeForward, "forward", lambda self, step: torch.zeros(len(step.wanted), self._model.config.vocab_size)
    )
    with pytest.raises(
        ConfigurationError, match=r"LlamaForCausalLM is not served: .*lean: logits differ by .* rounding.*recomputed: "
    ):
        proof.prove(load_base_model(tiny_base), rows=4)
    with pytest.raises(ConfigurationError, match=r"packed: the base keeps .*stacked: .*row by row: .*recomputed: "):
        proof.prove(load_base_model(lfm2), rows=4)


def edge_off_by_one(patch: pytest.MonkeyPatch) -> None:
    own = KVCache.look

    def wider(self: KVCache, query: Any, room: Any, scaling: Any, window: Any = None, **options: Any) -> torch.Tensor:
        return own(self, query, room, scaling, window and window + 1, **options)

    patch.setattr(KVCache, "look", wider)
    fill = NativeForward._fill

    def wider_in_c(self: NativeForward, index: int, layer: Any, positions: int) -> object:
        room = fill(self, index, layer, positions)
        layer.window += layer.window > 0
        return room

    patch.setattr(NativeForward, "_fill", wider_in_c)


def late_tokens_turned_too_far(patch: pytest.MonkeyPatch) -> None:
    own = LeanForward._turns

    def further(self: LeanForward, positions: torch.Tensor) -> dict[str, Turn]:
        return own(self, positions + (positions > 14).long())

    patch.setattr(LeanForward, "_turns", further)
    reach = forward_native._Turns.reach

    def further_in_c(self: Any, positions: int) -> None:
        reach(self, positions)
        self.cos[15:-1], self.sin[15:-1] = self.cos[16:].clone(), self.sin[16:].clone()

    patch.setattr(forward_native._Turns, "reach", further_in_c)


def one_sink_missing(patch: pytest.MonkeyPatch) -> None:
    own = KVCache.look

    def fewer(self: KVCache, *arguments: Any, sinks: torch.Tensor, **options: Any) -> torch.Tensor:
        return own(self, *arguments, sinks=sinks.index_fill(0, torch.tensor([1]), -30.0), **options)

    patch.setattr(KVCache, "look", fewer)


def state_of_another_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowStates, "move", lambda self, source, target: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "fault", "way"),
    [
        ("mistral", edge_off_by_one, "lean"),
        ("qwen3", late_tokens_turned_too_far, "lean"),
        ("gpt_oss", one_sink_missing, "packed"),
        ("qwen3_5_text", state_of_another_row, "stacked"),
    ],
)
def test_a_small_fault_is_seen_whatever_the_dtype(
    family: str, fault: Callable[[pytest.MonkeyPatch], None], way: str, dtype: torch.dtype, tmp_path: Path,
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = build(family, tmp_path, byte_tokenizer)
    assert proof.prove(load_base_model(base, dtype=dtype), rows=4)[1].kind == way
    fault(monkeypatch)
    verdict = proof.prove(load_base_model(base, dtype=dtype), rows=4)[1]
    assert verdict.kind != way and any(reason.startswith(f"{way}: logits differ") for reason in verdict.reasons)


def test_widening_changes_no_bit(mistral: Path) -> None:
    model: Any = load_base_model(mistral, dtype=torch.bfloat16)
    place = model.model.norm.weight.data_ptr()
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with proof.widened(model):
        assert model.dtype == torch.float32
    assert model.model.norm.weight.data_ptr() == place
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_a_fault_of_16_bits_alone_is_seen(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 does not show: here logits that lose four bits more."""
    own = NativeForward.forward

    def coarse(self: NativeForward, step: Step) -> torch.Tensor:
        out = own(self, step)
        return (
            out if self._model.dtype == torch.float32 else (out.bfloat16().view(torch.int16) & -16).view(torch.bfloat16)
        )

    monkeypatch.setattr(NativeForward, "forward", coarse)
    verdict = proof.prove(load_base_model(mistral, dtype=torch.bfloat16), rows=4)[1]
    assert verdict.kind == "packed" and verdict.tolerance == proof.TOLERANCE


def test_a_base_that_there_is_no_memory_to_widen_is_compared_in_its_own_dtype(
    mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "free_memory", lambda device: 1000)
    verdict = proof.prove(load_base_model(mistral, dtype=torch.bfloat16), rows=4)[1]
    assert (verdict.kind, verdict.tolerance) == ("lean", proof.TOLERANCE_16_BITS)


def test_an_adapter_that_is_not_added_is_seen(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub_lite.serving.model.lora.pairs_torch import TorchLora

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
