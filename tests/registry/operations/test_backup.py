"""A home in one file and back: all of one instant, verified, and nothing else."""

import io
import sqlite3
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import AdapterHubError, IntegrityError, UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.sign import generate_key
from tests.fixture_types import MakeAdapter

TABLES = ("versions", "aliases", "names", "removed", "tags", "metrics", "journal", "evaluations")
MEASURED = {"metric": "exact_match", "data": "held-out", "base_value": 0.0, "adapter_value": 0.5}


def everything(registry: AdapterRegistry) -> dict[str, list[Any]]:
    """Every row of every table."""
    connection = registry.store.read()
    there = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr) for table in TABLES if table in there}


@pytest.fixture
def used(tmp_path: Path, make_adapter: MakeAdapter, tiny_base: Path) -> AdapterRegistry:
    """A home in which everything happened that can."""
    registry, base = AdapterRegistry(tmp_path / "used"), resolve_base(tiny_base)
    for seed in (1, 2, 3):
        registry.add(make_adapter(seed=seed), "sql", base=base, task="to SQL", tags=("a",), evaluation=[MEASURED])
    for version in (1, 2):
        registry.set_alias("sql", "prod", version=version)
    registry.rollback("sql", "prod")
    generate_key(registry.home)
    registry.sign("sql:1")
    registry.pin("sql:2")
    registry.remove("sql:3")
    registry.record_evaluation("sql:2", [type(registry.resolve("sql:1").evaluation[0]).model_validate(MEASURED)])
    return registry


def test_a_restored_home_is_the_saved_one(used: AdapterRegistry, tmp_path: Path) -> None:
    file = tmp_path / "all.tar"
    saved = used.backup(file)
    back = AdapterRegistry(tmp_path / "back")
    assert back.restore(file) == saved and saved.versions == 2
    assert everything(back) == everything(used)
    assert back.examine().healthy and back.verify("sql:1") is None
    assert not (back.home / "keys").exists() and file.stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="has a registry already"):
        back.restore(file)
    with pytest.raises(UsageError, match="is there already"):
        used.backup(file)
    used.backup(tmp_path / "keys.tar", keys=True)
    with_keys = AdapterRegistry(tmp_path / "with-keys")
    with_keys.restore(tmp_path / "keys.tar")
    assert with_keys.sign("sql:2")


def test_a_backup_beside_writers_is_of_one_instant(
    used: AdapterRegistry, make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    """A version is added before `newest` moves to it: at no instant is there one without the other."""
    stop, folder = threading.Event(), make_adapter(seed=4)

    def write() -> None:
        other, base = AdapterRegistry(used.home), resolve_base(tiny_base)
        while not stop.is_set():
            other.set_alias("sql", "newest", version=other.add(folder, "sql", base=base).version)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(4):
            used.backup(tmp_path / f"{number}.tar")
    finally:
        stop.set()
        writer.join()
    for number in range(4):
        back = AdapterRegistry(tmp_path / f"back-{number}")
        back.restore(tmp_path / f"{number}.tar")
        newest = back.aliases("sql").get("newest", 2)
        versions = sorted(manifest.version for manifest in back.list())  # 3 was removed, and is given to no other
        assert versions.index(newest) >= len(versions) - 2
        assert back.examine().healthy


@given(at=st.floats(0, 1, exclude_max=True), cut=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_backup_shows_no_version(
    at: float, cut: bool, used: AdapterRegistry, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    used.backup(folder / "whole.tar")
    content = bytearray((folder / "whole.tar").read_bytes())
    place = int(at * len(content))
    if cut:
        del content[place:]
    else:
        content[place] ^= 0xFF
    (folder / "damaged.tar").write_bytes(content)
    back = AdapterRegistry(folder / "back")
    try:
        back.restore(folder / "damaged.tar")
    except IntegrityError:
        assert not back.list() and not list((back.home / "manifests").glob("*"))
    else:  # padding between files, which is nobody's
        assert everything(back) == everything(used)


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "manifests/../x/1.json", "registry.db", "keys/../../a.pem"])
def test_a_backup_puts_nothing_elsewhere(name: str, tmp_path: Path) -> None:
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    index = f'{{"schema_version":1,"created":"","files":{{"{name}":{{"sha256":"{digest}","size":0}}}}}}'.encode()
    with tarfile.open(tmp_path / "strange.tar", "w") as archive:
        for member, content in (("backup.json", index), (name, b"")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(IntegrityError, match="names a file that no registry has"):
        AdapterRegistry(tmp_path / "back").restore(tmp_path / "strange.tar")


def test_a_rotten_object_is_found_before_it_is_saved(used: AdapterRegistry, tmp_path: Path) -> None:
    manifest = used.resolve("sql:1")
    path = used.file(manifest, "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(AdapterHubError, match="other bytes than promised"):
        used.backup(tmp_path / "all.tar")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*.part"))
    assert sqlite3.connect(used.home / "registry.db").execute("SELECT count(*) FROM versions").fetchone() == (2,)
