"""`verify="probes"`: what is taken in is asked its probes first, and refused when it answers otherwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.adapter_format.probes import replay_probes
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import BaseMismatchError, UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.intake import import_adapter
from adapterhub_lite.registry.operations.replay import adapted_model


def test_probes_are_recorded_at_add_where_there_are_none(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    assert "probes.safetensors" not in registry.add(adapter, "sql", base=base).files
    manifest = registry.add(adapter, "sql", base=base, verify="probes")
    assert "probes.safetensors" in manifest.files
    folder = registry.export("sql:2", tmp_path / "out")
    assert replay_probes(adapted_model(folder, base), folder).max_abs_difference == 0.0


def test_an_adapter_that_answers_otherwise_is_refused_at_add(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    registry.add(adapter, "sql", base=base, verify="probes")
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "probes.safetensors"):
        shutil.copyfile(registry.file(registry.resolve("sql"), name), changed / name)
    assert registry.add(changed, "sql", base=base, verify="probes").version == 2
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    with pytest.raises(BaseMismatchError, match="does not behave here as recorded"):
        registry.add(changed, "sql", base=base, verify="probes")
    assert len(registry.list()) == 2


def test_a_pull_replays_it_on_the_base_here(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    manifest = registry.add(adapter, "sql", base=base, verify="probes")
    folder = registry.export("sql", tmp_path / "parcel")
    there = AdapterRegistry(tmp_path / "there")
    with pytest.raises(UsageError, match="need their base"):
        import_adapter(there.store, folder, verify="probes", name="sql")
    pulled = import_adapter(there.store, folder, base=base, verify="probes", name="sql")
    assert pulled.digest == manifest.digest
    assert pulled.origin is not None
    assert (pulled.origin.name, pulled.origin.version) == ("sql", 1)


def test_an_adapter_without_probes_says_so(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    registry.add(adapter, "sql", base=base)
    folder = registry.export("sql", tmp_path / "parcel")
    with pytest.raises(UsageError, match="carries no probes"):
        import_adapter(AdapterRegistry(tmp_path / "there").store, folder, base=base, verify="probes", name="sql")


def test_an_unknown_quantisation_is_not_guessed(adapter: Path, base: ResolvedBase) -> None:
    with pytest.raises(UsageError, match="'fp3' is no quantisation"):
        adapted_model(adapter, base, quantization="fp3")


def test_a_merge_keeps_singing(
    registry: AdapterRegistry, make_adapter: Any, base: ResolvedBase, tmp_path: Path
) -> None:
    from adapterhub_lite.merging import merge_adapters

    registry.add(make_adapter(seed=1), "a", base=base, verify="probes")
    merged = merge_adapters(["a"], [1.0], registry=registry, base=base).manifest
    folder = registry.export(merged.reference, tmp_path / "merged")
    shutil.copyfile(registry.file(registry.resolve("a"), "probes.safetensors"), folder / "probes.safetensors")
    assert replay_probes(adapted_model(folder, base), folder).passed
