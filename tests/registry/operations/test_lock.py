"""A lock says byte for byte what is used, and finds without a network whatever is not that."""

import json
import shutil
from pathlib import Path

import pytest

from adapterhub_lite.adapter_format.manifest import FileRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import (
    DataError,
    IntegrityError,
    RegistryError,
    SchemaVersionError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.pull import pull_locked
from adapterhub_lite.registry.operations.intake import import_adapter
from adapterhub_lite.registry.operations.lock import Lock, read_lock, verify_lock, write_lock


@pytest.fixture
def home_base(home: Path, tiny_base: Path) -> ResolvedBase:
    """The tiny base as a hub base in the home's cache, where a lock finds it by itself."""
    commit = "0123456789" * 4
    folder = home / "bases" / "hub" / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns(".fingerprint.json"))
    return ResolvedBase("org/tiny", "org/tiny", folder, revision=commit)


@pytest.fixture
def locked(
    registry: AdapterRegistry, adapter: Path, other_adapter: Path, home_base: ResolvedBase, tmp_path: Path
) -> Path:
    registry.add(adapter, "sql", base=home_base)
    registry.add(other_adapter, "event", base=home_base)
    registry.set_alias("sql", "prod", version=1)
    write_lock(registry.store, ["sql@prod", "event", "sql:1"], tmp_path / "adapters.lock", sources={"sql": "org/sql"})
    return tmp_path / "adapters.lock"


def test_a_lock_is_written_read_and_holds(registry: AdapterRegistry, locked: Path) -> None:
    lock = read_lock(locked)
    assert [(entry.reference, entry.source) for entry in lock.adapters] == [("event:1", None), ("sql:1", "org/sql")]
    assert set(lock.adapters[0].base.tokenizer) == {"tokenizer.json", "chat_template.jinja"}
    assert verify_lock(registry.store, lock) == []
    first = locked.read_bytes()
    write_lock(registry.store, ["event", "sql"], locked, sources={"sql": "org/sql"})
    assert locked.read_bytes() == first, "the same adapters are the same bytes"


def test_whatever_differs_is_named(registry: AdapterRegistry, locked: Path, home_base: ResolvedBase) -> None:
    lock = read_lock(locked)
    tokenizer = home_base.folder / "chat_template.jinja"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert all("has the fingerprint" in problem for problem in verify_lock(registry.store, lock))
    tokenizer.write_text(tokenizer.read_text()[:-1])
    assert verify_lock(registry.store, lock) == []
    path = registry.file(registry.resolve("sql"), "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    assert [problem.split(" has the sha256")[0] for problem in verify_lock(registry.store, lock)] == [
        "sql:1: adapter_model.safetensors"
    ]
    path.unlink()
    assert "missing or damaged" in verify_lock(registry.store, lock)[0]
    shutil.rmtree(home_base.folder)
    assert any("not on this machine" in problem for problem in verify_lock(registry.store, lock))


def test_another_machine_is_brought_to_the_lock(
    registry: AdapterRegistry, locked: Path, home_base: ResolvedBase, tmp_path: Path
) -> None:
    there = AdapterRegistry(tmp_path / "there")
    lock = read_lock(locked)
    assert ["pull it" in problem for problem in verify_lock(there.store, lock, bases=[home_base])] == [True, True]
    for entry in lock.adapters:
        import_adapter(
            there.store,
            registry.export(entry.digest, tmp_path / entry.name),
            name=entry.name,
            expected=registry.resolve(entry.digest),
        )
    assert verify_lock(there.store, lock, bases=[home_base]) == []


def test_the_same_bytes_under_another_name_or_version_are_not_what_is_locked(
    registry: AdapterRegistry, adapter: Path, other_adapter: Path, home_base: ResolvedBase, tmp_path: Path
) -> None:
    """`sql:1` would answer with whatever it is here, while the lock was said to hold."""
    from adapterhub_lite.hub_server import HubServer

    registry.add(adapter, "sql", base=home_base)
    lock = write_lock(
        registry.store, ["sql"], tmp_path / "adapters.lock", sources={"sql": "org/sql"}, bases=[home_base]
    )
    with HubServer(tmp_path / "hub") as hub:
        registry.push("sql", "org/sql", endpoint=hub.url)
        renamed, later, taken = (AdapterRegistry(tmp_path / name) for name in ("renamed", "later", "taken"))
        renamed.pull("org/sql", name="other", endpoint=hub.url, base=home_base)
        assert "not here under that name" in verify_lock(renamed.store, lock, bases=[home_base])[0]
        later.pull("org/sql", endpoint=hub.url, base=home_base)
        third = Lock(adapters=(lock.adapters[0].model_copy(update={"version": 3, "revision": "v1"}),))
        for there, wanted, reference in ((renamed, lock, "sql:1"), (later, third, "sql:3")):
            (pulled,) = pull_locked(there.store, wanted, endpoint=hub.url, bases=[home_base])
            assert pulled.reference == reference and verify_lock(there.store, wanted, bases=[home_base]) == []
        taken.add(other_adapter, "sql", base=home_base)
        taken.pull("org/sql", name="other", endpoint=hub.url, base=home_base)
        assert "locked is sha256:" in verify_lock(taken.store, lock, bases=[home_base])[0]
        with pytest.raises(RegistryError, match="sql:1"):
            pull_locked(taken.store, lock, endpoint=hub.url, bases=[home_base])


@pytest.mark.parametrize("what", ["base", "adapter_model.safetensors"])
def test_what_differs_from_the_lock_is_named(
    what: str, registry: AdapterRegistry, adapter: Path, home_base: ResolvedBase, tmp_path: Path
) -> None:
    from adapterhub_lite.hub_server import HubServer

    registry.add(adapter, "sql", base=home_base)
    (entry,) = write_lock(registry.store, ["sql"], tmp_path / "l", sources={"sql": "org/sql"}).adapters
    base = entry.base.model_copy(update={"fingerprint": "0" * 64})
    files = {**entry.files, what: FileRecord(size=1, sha256="0" * 64)}
    changed = entry.model_copy(update={"base": base} if what == "base" else {"files": files})
    there = AdapterRegistry(tmp_path / "there")
    with HubServer(tmp_path / "hub") as hub:
        registry.push("sql", "org/sql", endpoint=hub.url)
        with pytest.raises(IntegrityError, match=f"with another {what}. Nothing was taken in"):
            pull_locked(there.store, Lock(adapters=(changed,)), endpoint=hub.url)
    assert there.list() == []


def test_what_is_no_lock_is_said(registry: AdapterRegistry, locked: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        write_lock(registry.store, [])
    with pytest.raises(UnknownNameError):
        write_lock(registry.store, ["nobody"], locked)
    with pytest.raises(UsageError, match="no lock"):
        read_lock(tmp_path / "nowhere")
    content = json.loads(locked.read_text())
    locked.write_text(json.dumps({**content, "schema_version": 2}))
    with pytest.raises(SchemaVersionError):
        read_lock(locked)
    locked.write_text(json.dumps({**content, "extra": 2}))
    with pytest.raises(DataError, match="extra"):
        read_lock(locked)
    locked.write_text("[")
    with pytest.raises(DataError):
        read_lock(locked)


def test_what_is_missing_is_pulled_and_nothing_else_taken(
    registry: AdapterRegistry, adapter: Path, other_adapter: Path, home_base: ResolvedBase, tmp_path: Path
) -> None:
    from adapterhub_lite.hub_server import HubServer

    manifest = registry.add(adapter, "sql", base=home_base)
    lock = write_lock(registry.store, ["sql"], tmp_path / "adapters.lock", sources={"sql": "org/sql"})
    there = AdapterRegistry(tmp_path / "there")
    with HubServer(tmp_path / "hub") as hub:
        registry.push("sql", "org/sql", endpoint=hub.url)
        (pulled,) = pull_locked(there.store, lock, endpoint=hub.url)
        assert (pulled.reference, pulled.published()) == ("sql:1", manifest)
        assert pull_locked(there.store, lock, endpoint="http://127.0.0.1:9") == [], "nothing is missing any more"
        moved = lock.adapters[0].model_copy(update={"digest": "sha256:" + "0" * 64})
        with pytest.raises(IntegrityError, match="another adapter as v1 than the lock"):
            pull_locked(AdapterRegistry(tmp_path / "third").store, Lock(adapters=(moved,)), endpoint=hub.url)
    assert AdapterRegistry(tmp_path / "third").list() == []
    alone = lock.adapters[0].model_copy(update={"source": None})
    with pytest.raises(UsageError, match="does not say where"):
        pull_locked(AdapterRegistry(tmp_path / "third").store, Lock(adapters=(alone,)))
