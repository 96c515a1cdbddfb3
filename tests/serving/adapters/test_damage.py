"""The receipt names bytes that were verified: what flips on disk or in host memory is never answered with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapterhub_lite.errors import AdapterHubError, IntegrityError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine

Make = Callable[..., InferenceEngine]
ASK = GenerationRequest(prompt="select the", adapter="small", max_new_tokens=8)


def weights_of(registry: AdapterRegistry, name: str) -> Path:
    path = registry.file(registry.resolve(name), "adapter_model.safetensors")
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("where", ["first value", "last value", "middle"])
def test_a_bit_that_flipped_on_disk_is_found_before_anything_is_answered(
    make_engine: Make, registered: AdapterRegistry, where: str
) -> None:
    path = weights_of(registered, "small")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    at = {"first value": start, "last value": len(content) - 1, "middle": (start + len(content)) // 2}[where]
    content[at] ^= 1
    path.write_bytes(content)
    engine = make_engine(registry=registered)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="not the recorded bytes"):
            engine.generate(ASK)
    assert engine.status().damaged == 2
    wide = engine.generate(GenerationRequest(prompt="select the", adapter="wide", max_new_tokens=8))
    assert wide.adapter_digest == registered.resolve("wide").digest


@pytest.mark.parametrize("harm", ["truncated", "gone", "unreadable header"])
def test_a_damaged_object_is_no_fault_of_the_adapter(make_engine: Make, registered: AdapterRegistry, harm: str) -> None:
    path = weights_of(registered, "small")
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-4] if harm == "truncated" else b"\xff" * 16 + content[16:])
    engine = make_engine(registry=registered)
    with pytest.raises(AdapterHubError) as refused:
        engine.generate(ASK)
    assert isinstance(refused.value, IntegrityError)
    assert engine.status().damaged == 1


def test_a_bit_that_flipped_in_host_memory_is_found_and_read_again(
    make_engine: Make, registered: AdapterRegistry
) -> None:
    engine = make_engine(registry=registered, max_slots=1)
    truth = engine.generate(ASK).token_ids
    engine.load("wide")  # takes the only slot: what was there stays in host memory
    assert engine.tier("small") == "host"
    held, _ = engine._pool._host._held[registered.resolve("small").digest]
    next(iter(held.families.values())).b.view(torch.uint8).view(-1)[0] ^= 64
    assert engine.generate(ASK).token_ids == truth
    assert engine.status().damaged == 1


def test_a_folder_that_changes_while_it_is_served_is_another_adapter(
    make_engine: Make, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "mine"
    shutil.copytree(adapters["small"], folder)
    engine = make_engine()
    ask = GenerationRequest(prompt="select the", adapter=folder, max_new_tokens=4)
    first = engine.generate(ask)
    shutil.copyfile(adapters["patterned"] / "adapter_config.json", folder / "adapter_config.json")
    shutil.copyfile(adapters["patterned"] / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    assert engine.generate(ask).adapter_digest != first.adapter_digest
