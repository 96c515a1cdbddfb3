"""What differs between two versions, down to the subspaces of the two changes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterRegistry


def _changed(source: Path, target: Path, change: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(path).items()}, path)
    return target


def test_the_manifests_are_compared(registry: AdapterRegistry, make_adapter: Any, base: ResolvedBase) -> None:
    def measured(value: float) -> list[dict[str, object]]:
        return [{"metric": "em", "adapter_value": value, "data": "d"}]

    registry.add(make_adapter(seed=1), "sql", base=base, evaluation=measured(0.5), tags=("old",))
    registry.add(make_adapter(seed=1, rank=8, alpha=16), "sql", base=base, evaluation=measured(0.75))
    found = registry.diff("sql:1", "sql:2", layers=False)
    assert found.fields == {"lora.rank": (4, 8), "lora.alpha": (8.0, 16.0), "tags": (["old"], [])}
    assert found.metrics == {"em on d": (0.5, 0.75)}
    assert found.same_base and found.layers == ()


def test_the_same_change_is_fully_similar_however_it_is_factored(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    mix = torch.linalg.qr(torch.randn(4, 4)).Q

    def rotated(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return mix @ tensor if "lora_A" in name else tensor @ mix.T

    registry.add(adapter, "a", base=base)
    registry.add(_changed(adapter, tmp_path / "rotated", rotated), "b", base=base)
    registry.add(_changed(adapter, tmp_path / "negated", lambda n, t: -t if "lora_A" in n else t), "c", base=base)
    for other, cosine in (("b", 1.0), ("c", -1.0)):
        for layer in registry.diff("a", other).layers:
            assert layer.input_similarity == pytest.approx(1, abs=1e-6)
            assert layer.output_similarity == pytest.approx(1, abs=1e-6)
            assert layer.cosine == pytest.approx(cosine, abs=1e-6)
            assert layer.norm == pytest.approx(layer.other_norm, rel=1e-5)


def test_orthogonal_changes_are_not_similar_and_half_is_half(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    def first(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.eye(*tensor.shape) if "lora_A" in name else tensor

    def shifted(by: int) -> Any:
        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return torch.eye(*tensor.shape).roll(by, dims=1) if "lora_A" in name else tensor

        return change

    registry.add(_changed(adapter, tmp_path / "a", first), "a", base=base)
    registry.add(_changed(adapter, tmp_path / "b", shifted(4)), "b", base=base)
    registry.add(_changed(adapter, tmp_path / "c", shifted(2)), "c", base=base)
    for other, similarity in (("b", 0.0), ("c", 0.5)):
        for layer in registry.diff("a", other).layers:
            assert layer.input_similarity == pytest.approx(similarity, abs=1e-9)
            assert layer.output_similarity == pytest.approx(1, abs=1e-6)


def test_a_module_of_only_one_is_listed(registry: AdapterRegistry, make_adapter: Any, base: ResolvedBase) -> None:
    registry.add(make_adapter(targets=("q_proj",)), "a", base=base)
    registry.add(make_adapter(targets=("q_proj", "v_proj")), "b", base=base)
    layers = {layer.module: layer for layer in registry.diff("a", "b").layers}
    alone = layers["model.layers.1.self_attn.v_proj"]
    assert (alone.input_similarity, alone.norm) == (0.0, 0.0) and alone.other_norm > 0
    assert len(layers) == 4
