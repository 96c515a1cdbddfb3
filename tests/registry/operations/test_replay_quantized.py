"""An adapter trained over a quantised base is asked its probes on a base quantised in the same way, at every door."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite import AdapterTrainer, AdapterTrainingArguments
from adapterhub_lite.adapter_format.quantization import Quantization
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import BaseMismatchError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.replay import check_probes, check_stored

ROWS = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c * 2}]} for c in "abcd"]


@pytest.fixture(scope="module", params=["int8", "nf4"])
def trained(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained over the tiny base in 8 or 4 bits, with record and probes."""
    out = tmp_path_factory.mktemp(request.param)
    preset = {"int8": "lora-int8", "nf4": "qlora-nf4"}[request.param]
    args = AdapterTrainingArguments(
        output_dir=str(out / "run"), max_steps=2, per_device_train_batch_size=2, rank=4, use_cpu=True,
        memory_preset=preset, learning_rate=1e-2, show_progress=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = AdapterTrainer(str(tiny_base), args, ROWS)
    trainer.train()
    return trainer.save_adapter(out / request.param)


def test_add_pull_and_verify_ask_on_a_base_quantised_as_in_training(
    trained: Path, base: ResolvedBase, registry: AdapterRegistry, hub_server: Any, tmp_path: Path
) -> None:
    word = trained.name
    manifest = registry.add(trained, "sql", base=base, verify="probes")
    assert manifest.base.quantization == word and manifest.training and manifest.training.base.quantization == word
    assert check_stored(registry, manifest, base=base).passed
    hub: dict[str, Any] = {"endpoint": hub_server.url}
    registry.push("sql", "org/sql", **hub)
    there = AdapterRegistry(tmp_path / "there")
    assert there.pull("org/sql", base=base, verify="probes", **hub).manifest.digest == manifest.digest
    assert there.pull("org/sql", base=base, verify="probes", **hub).source == "store"


def test_where_there_are_no_probes_they_are_recorded_so(
    trained: Path, base: ResolvedBase, registry: AdapterRegistry, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "bare"))
    (folder / "probes.safetensors").unlink()
    manifest = registry.add(folder, "sql", base=base, verify="probes")
    recorded = registry.export("sql", tmp_path / "out")
    assert check_probes(recorded, base, "it", manifest.base.quantization).max_abs_difference == 0.0
    assert check_probes(trained, base, "it", manifest.base.quantization).passed


def test_records_from_before_the_short_words_are_understood(trained: Path, base: ResolvedBase) -> None:
    config = Quantization(trained.name).bitsandbytes().to_json_string(use_diff=False)
    assert check_probes(trained, base, "it", config).passed


def test_another_quantisation_is_noticed(trained: Path, base: ResolvedBase) -> None:
    if trained.name == "int8":
        pytest.skip("8 bits are within what bf16 rounds")
    with pytest.raises(BaseMismatchError, match="another quantisation"):
        check_probes(trained, base, "it", None)
