"""What the merging tests share: a registry with the tiny base, and what PEFT says an adapter adds to each module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry

Add = Callable[..., AdapterManifest]


@pytest.fixture
def registry(home: Path) -> AdapterRegistry:
    return AdapterRegistry(home)


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> ResolvedBase:
    return resolve_base(tiny_base)


@pytest.fixture
def add(registry: AdapterRegistry, make_adapter: Any, base: ResolvedBase) -> Add:
    """Make an adapter with PEFT and add it: add("name", seed=..., rank=..., ...)."""

    def make(name: str, **lora: Any) -> AdapterManifest:
        return registry.add(make_adapter(**lora), name, base=base)

    return make


@pytest.fixture
def deltas(registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """What PEFT itself, given our exported folder, adds to each module: the truth the merges are measured with."""

    def of(reference: str) -> dict[str, torch.Tensor]:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        folder = tmp_path / "exported" / reference.replace(":", "-")
        if not folder.exists():
            registry.export(reference, folder)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), folder)
        return {
            name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }

    return of


@pytest.fixture
def training_record() -> Callable[..., Any]:
    """A training record for a base: training_record(base, quantization=None)."""
    from adapterhub_lite.adapter_format.manifest import BaseRecord, DataRecord, MemoryRecord, TrainingRecord

    def make(base: ResolvedBase, quantization: str | None = None) -> TrainingRecord:
        return TrainingRecord(
            base=BaseRecord(id=base.model_id, fingerprint=base.fingerprint, quantization=quantization),
            data=DataRecord(id="/home/ann/rows.jsonl", rows=3, fingerprint="0" * 64),
            template_digest="0" * 64,
            seeds={"init": 0},
            hyperparameters={"output_dir": "/home/ann/runs/1", "lr": 1e-3},
            packages={"torch": "2.13"},
            preset="lora-fp32",
            loss_backend={"name": "chunked"},
            memory=MemoryRecord(measured_peak_bytes=1),
            hardware={"cpu": "one"},
            steps=1,
            wall_seconds=1.0,
        )

    return make
