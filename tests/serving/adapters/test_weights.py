"""Reading an adapter: what is in memory is what PEFT computes with, and what is wrong is refused with every reason."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.errors import AdapterRejectedError, ReferenceSyntaxError, UnknownNameError
from adapterhub_lite.serving import GenerationRequest
from adapterhub_lite.serving.adapters.sources import FolderSource
from adapterhub_lite.serving.adapters.split import parse_blend
from adapterhub_lite.serving.adapters.weights import AdapterWeights, Family, find_families, read_adapter_weights

Tensors = dict[str, torch.Tensor]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def families(tiny_base: Path) -> tuple[Family, ...]:
    return find_families(load_base_model(tiny_base))


def read(folder: Path, families: tuple[Family, ...]) -> AdapterWeights:
    files = FolderSource().locate(folder)
    return read_adapter_weights(files.weights, families, files.scaling_of, max_rank=16, subject="test")


def read_tensors(folder: Path, families: tuple[Family, ...]) -> AdapterWeights:
    """Read the weights alone, as if the folder had never been examined."""
    path = folder / "adapter_model.safetensors"
    return read_adapter_weights(path, families, lambda _: 1.0, max_rank=16, subject="test")


@pytest.fixture
def changed(adapters: dict[str, Path], tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Path]:
    """A function (change) -> a copy of an adapter whose tensors `change` has altered."""

    def make(change: Callable[[Tensors], None]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(adapters["wide"], folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        return folder

    return make


def test_families_are_the_linear_layers_of_the_repeated_blocks(families: tuple[Family, ...]) -> None:
    assert len(families) == 7 and all(len(family.paths) == 2 for family in families)
    assert not any("lm_head" in family.name for family in families)


@pytest.mark.parametrize("name", ["small", "wide", "rs", "patterned", "partial"])
def test_scaled_products_are_pefts_deltas(name: str, adapters: dict[str, Path], families: Any, alone: Any) -> None:
    weights = read(adapters[name], families)
    model = alone.model((adapters[name], 1.0))
    seen = 0
    for family in families:
        pair = weights.families.get(family.name)
        for at, layer in enumerate(pair.layers if pair else ()):
            assert pair is not None
            delta = (pair.b[at] * pair.scale[at]).T @ pair.a[at]
            module = model.base_model.model.get_submodule(family.paths[layer])
            torch.testing.assert_close(delta, module.get_delta_weight("a0"))
            seen += 1
    assert seen == weights.modules > 0


@pytest.mark.parametrize(
    "dtype_of",
    [
        lambda name: torch.float16 if "lora_A" in name else torch.float32,
        lambda name: torch.bfloat16 if "lora_B" in name else torch.float32,
        lambda name: torch.float16 if "lora_A" in name else torch.bfloat16,
        lambda name: torch.bfloat16 if "layers.0" in name else torch.float32,
    ],
    ids=["half A", "bfloat16 B", "half A, bfloat16 B", "one layer"],
)
def test_a_file_may_mix_dtypes(
    dtype_of: Callable[[str], torch.dtype], changed: Any, families: Any, alone: Any, make_engine: Any
) -> None:
    """Compiled code reads both halves of a pair as one dtype: one of them was read as other numbers, beyond its end."""
    folder = changed(lambda tensors: tensors.update({name: t.to(dtype_of(name)) for name, t in tensors.items()}))
    weights = read(folder, families)
    stored = load_file(folder / "adapter_model.safetensors")
    for family in families:
        pair = weights.families[family.name]
        assert pair.a.dtype == pair.b.dtype
        for at, layer in enumerate(pair.layers):
            half = f"base_model.model.{family.paths[layer]}.lora_"
            assert torch.equal(pair.a[at].float(), stored[f"{half}A.weight"].float())
            assert torch.equal(pair.b[at].T.float(), stored[f"{half}B.weight"].float())
    asked = GenerationRequest(prompt="mixed", adapter=folder, max_new_tokens=8)
    assert make_engine().generate(asked).token_ids == alone.tokens("mixed", folder, new=8)


def test_bytes_in_memory_are_those_of_the_file(adapters: dict[str, Path], families: Any) -> None:
    weights = read(adapters["wide"], families)
    tensors = load_file(adapters["wide"] / "adapter_model.safetensors")
    assert weights.nbytes <= 1.1 * sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(FIRST + "A.weight"), "with its partner"),
        (lambda t: t.update({FIRST + "A.weight": torch.zeros(8, 31)}), r"shapes \(8, 31\)"),
        (lambda t: t.update({FIRST + "B.weight": torch.zeros(32, 7)}), "shapes"),
        (lambda t: t[FIRST + "B.weight"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 32)}), "no linear layer lm_head"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32)}), "are not LoRA weights"),
        (lambda t: t.clear(), "no LoRA pair at all"),
        (
            lambda t: t.update({FIRST + "A.weight": torch.zeros(0, 32), FIRST + "B.weight": torch.zeros(32, 0)}),
            "shapes",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    changed: Any, families: Any, change: Callable[[Tensors], None], reason: str
) -> None:
    with pytest.raises(AdapterRejectedError, match=reason):
        read_tensors(changed(change), families)


def test_every_reason_is_told(changed: Any, families: Any) -> None:
    def ruin(tensors: Tensors) -> None:
        tensors.pop(FIRST + "A.weight")
        tensors["what.is.this"] = torch.zeros(1)

    with pytest.raises(AdapterRejectedError) as caught:
        read_tensors(changed(ruin), families)
    assert len(caught.value.problems) == 2


def test_files_that_are_none(adapters: dict[str, Path], families: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapters["small"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(AdapterRejectedError, match=r"cannot be read: .*no safetensors file"):
        read_tensors(broken, families)
    with pytest.raises(UnknownNameError, match="adapter_config"):
        FolderSource().locate(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "+", "a*", "a*x", "a+*2", "a*nan", "a*inf+b", "a**2"])
def test_blends_that_are_none(text: str) -> None:
    with pytest.raises(ReferenceSyntaxError):
        parse_blend(text)


def test_blends_that_are() -> None:
    parsed = [(part.reference, part.weight) for part in parse_blend(" sql:3*0.7 + event@prod*-0.3+x")]
    assert parsed == [("sql:3", 0.7), ("event@prod", -0.3), ("x", 1.0)]
