"""The engine's own int8 and int4: loaded, proven, told, refused where it is not to be had; the base's tensors held once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.model import loading
from adapterhub_lite.serving.model.compiled.packed_weights import QUANTISED, Precision, pack_weight, unpack_weight
from adapterhub_lite.serving.model.forward_native import NativeForward
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner
from tests.serving.model.families import build

compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")


@compiler
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_logits_are_those_of_the_quantised_weights(
    family: str, precision: Precision, tmp_path: Path, byte_tokenizer: Any
) -> None:
    """Held against the plain pass over a model that has the rounded weights; what is left is the rounding of rows."""
    base = build(family, tmp_path, byte_tokenizer)
    runner = ModelRunner(load_base_model(base, dtype=torch.float32), rows=1, kind=ForwardKind.LEAN, precision=precision)
    assert isinstance(runner._pass, NativeForward)
    model: Any = load_base_model(base, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = "int8" if name == "lm_head" else precision
            rounded = unpack_weight(pack_weight(module.weight, kind), kind, *module.weight.shape, torch.float32)
            module.weight.data = rounded  # a tied embedding too, which is read from the head
    ids = [5, 90, 17, 3, 250, 44]
    runner.admit(0, (), 16)
    found = runner.forward(pack([RowSlice(0, 0, ids, len(ids))]))
    truth = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert float((found - truth).square().mean().sqrt() / truth.std()) < 0.05


@compiler
@pytest.mark.parametrize("precision", QUANTISED)
def test_an_engine_keeps_its_base_so_and_says_so(tiny_base: Path, precision: Precision) -> None:
    with InferenceEngine.from_base(tiny_base, quantization=precision, device="cpu") as engine:
        assert engine.status().precision == precision
        assert len(engine.generate(GenerationRequest(prompt="Hello", max_new_tokens=3, ignore_eos=True)).token_ids) == 3


def test_what_cannot_be_kept_so_is_refused(
    tmp_path: Path, tiny_base: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build("gpt2", tmp_path, byte_tokenizer)
    with pytest.raises(ConfigurationError, match=r"cannot be kept as int4 here: .*Use nf4 or int8"):
        loading.load_for_serving(base, device="cpu", quantization="int4")
    with pytest.raises(ConfigurationError, match="int3"):
        loading.load_for_serving(tiny_base, device="cpu", quantization="int3")
    monkeypatch.setattr(loading, "compiled", lambda: None)
    with pytest.raises(ConfigurationError, match="there is no C compiler"):
        loading.load_for_serving(tiny_base, device="cpu", quantization="int4")


@compiler
@torch.inference_mode()
def test_a_tied_head_is_held_once(tmp_path: Path, byte_tokenizer: Any) -> None:
    model: Any = load_base_model(build("gemma3_text", tmp_path, byte_tokenizer), dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    runner = ModelRunner(model, rows=1, kind=ForwardKind.LEAN)
    assert model.lm_head.weight.numel() == 0
    digest = runner.base_digest()
    runner.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert ModelRunner(model, rows=1, kind=ForwardKind.PACKED).base_digest() == digest
