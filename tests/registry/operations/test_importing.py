"""The verified way in: what leaves one registry arrives in another unchanged, or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from adapterhub_lite.adapter_format.manifest import OriginRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import (
    AdapterRejectedError,
    BaseMismatchError,
    IntegrityError,
    RegistryError,
    SchemaVersionError,
)
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.merging import merge_adapters, merge_into_base
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.registry.operations.export import adapter_files, export_vllm
from adapterhub_lite.registry.operations.intake import import_adapter


@pytest.fixture
def there(tmp_path: Path) -> AdapterRegistry:
    """A second, empty registry."""
    return AdapterRegistry(tmp_path / "there")


@pytest.fixture
def parcel(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> tuple[AdapterManifest, Path]:
    """Version 2 of `sql` as its published files."""
    registry.add(adapter, "sql", base=base)
    manifest = registry.add(adapter, "sql", base=base, task="sql")
    folder = tmp_path / "parcel"
    folder.mkdir()
    for name, path in adapter_files(registry.store, manifest).items():
        shutil.copyfile(path, folder / name)
    return manifest, folder


def test_a_version_arrives_with_its_manifest_and_a_number_of_here(
    there: AdapterRegistry, parcel: tuple[AdapterManifest, Path], base: ResolvedBase
) -> None:
    manifest, folder = parcel
    taken = import_adapter(there.store, folder, base=base, name="mine")
    assert taken.reference == "mine:1" and taken.published() == manifest
    assert taken.origin == OriginRecord(name="sql", version=2)
    assert import_adapter(there.store, folder, base=base, name="mine") == taken, "again changes nothing"
    assert there.list() == [taken]
    kept = import_adapter(there.store, folder, name="sql", version=2)
    assert (kept.reference, kept.published()) == ("sql:2", manifest), "a lock gives a number of its own"


def test_the_next_local_version_comes_after(
    there: AdapterRegistry, parcel: tuple[AdapterManifest, Path], adapter: Path, base: ResolvedBase
) -> None:
    import_adapter(there.store, parcel[1], name="sql", version=2)
    assert there.add(adapter, "sql", base=base).version == 3


def test_a_taken_number_is_refused(
    there: AdapterRegistry, parcel: tuple[AdapterManifest, Path], other_adapter: Path, base: ResolvedBase
) -> None:
    for _ in range(2):
        there.add(other_adapter, "sql", base=base)
    with pytest.raises(RegistryError, match="sql:2 is another adapter here"):
        import_adapter(there.store, parcel[1], name="sql", version=2)
    assert import_adapter(there.store, parcel[1], name="sql").version == 3


def test_one_flipped_byte_is_found(there: AdapterRegistry, parcel: tuple[AdapterManifest, Path]) -> None:
    manifest, folder = parcel
    for name in manifest.files:
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(IntegrityError, match=name):
            import_adapter(there.store, folder, name="sql")
        content[-3] ^= 1
        (folder / name).write_bytes(content)
    assert there.list() == []


def test_what_is_damaged_here_is_neither_published_nor_exported_nor_merged(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer, tmp_path: Path
) -> None:
    """A published version never changes, so a rotten one could never be mended."""
    manifest = registry.add(adapter, "sql", base=base)
    path = registry.file(manifest, "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    out = tmp_path / "out"
    for attempt in (
        lambda: registry.push("sql", "org/sql", endpoint=hub_server.url),
        lambda: registry.export("sql", out),
        lambda: export_vllm(registry.store, [manifest], out),
        lambda: merge_adapters(["sql"], registry=registry, base=base),
        lambda: merge_into_base("sql", out, registry=registry, base=base),
    ):
        with pytest.raises(IntegrityError, match="missing or damaged"):
            attempt()
    assert not out.exists() and registry.list() == [manifest]
    assert not list(HfApi(endpoint=hub_server.url, token=False).list_models())


def _edit(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / "adapterhub.json").read_text())
    found.update(changes)
    (folder / "adapterhub.json").write_text(json.dumps(found))


def test_a_manifest_that_lies_is_refused(there: AdapterRegistry, parcel: tuple[AdapterManifest, Path]) -> None:
    manifest, folder = parcel
    original = (folder / "adapterhub.json").read_bytes()
    lies: list[dict[str, Any]] = [
        {"digest": "sha256:" + "0" * 64},
        {"lora": {**manifest.lora.model_dump(mode="json"), "scaling": 1.0}},
        {"files": {"../evil": {"sha256": "0" * 64, "size": 1}}},
        {"base": {**manifest.base.model_dump(), "fingerprint": "0" * 64}},
        {"surprise": 1},
        {"name": "../../etc"},
        {"version": 0},
    ]
    for lie in lies:
        _edit(folder, **lie)
        with pytest.raises(IntegrityError):
            import_adapter(there.store, folder, name="sql")
        (folder / "adapterhub.json").write_bytes(original)
    _edit(folder, schema_version=2)
    with pytest.raises(SchemaVersionError, match="Upgrade"):
        import_adapter(there.store, folder, name="sql")
    (folder / "adapterhub.json").unlink()
    with pytest.raises(IntegrityError, match=r"no adapterhub\.json"):
        import_adapter(there.store, folder, name="sql")
    assert there.list() == []


def test_what_was_expected_has_to_come(there: AdapterRegistry, parcel: tuple[AdapterManifest, Path]) -> None:
    manifest, folder = parcel
    wrong = manifest.model_copy(update={"digest": "sha256:" + "1" * 64})
    with pytest.raises(IntegrityError, match="not the adapter expected"):
        import_adapter(there.store, folder, expected=wrong, name="sql")
    assert import_adapter(there.store, folder, expected=manifest, name="sql").published() == manifest


def test_missing_files_are_named_and_others_left_alone(
    there: AdapterRegistry, parcel: tuple[AdapterManifest, Path]
) -> None:
    (parcel[1] / "payload.pkl").write_bytes(b"cos\nsystem\n")
    taken = import_adapter(there.store, parcel[1], name="other")
    assert set(taken.files) == set(parcel[0].files), "what does not belong to an adapter is left alone"
    (parcel[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterRejectedError, match="is missing"):
        import_adapter(there.store, parcel[1], name="sql")


def test_another_base_is_named(
    there: AdapterRegistry, parcel: tuple[AdapterManifest, Path], tiny_base: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved-base"
    shutil.copytree(tiny_base, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    (moved / ".fingerprint.json").unlink(missing_ok=True)
    with pytest.raises(BaseMismatchError, match=r"moved-base here has .*; what differs: config"):
        import_adapter(there.store, parcel[1], base=ResolvedBase("moved-base", "moved-base", moved), name="sql")
