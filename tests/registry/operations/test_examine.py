"""The doctor finds each kind of damage, and a rebuild gives back everything the database knew."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import RegistryError, SchemaVersionError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.sign import generate_key


@pytest.fixture
def lived_in(registry: AdapterRegistry, adapter: Path, other_adapter: Path, base: ResolvedBase) -> AdapterRegistry:
    """A registry with a past: versions, moved aliases, a pin, a removal, a signature."""
    generate_key(registry.home)
    for folder in (adapter, other_adapter, adapter, other_adapter):
        registry.add(
            folder, "sql", base=base, tags=("x",), evaluation=[{"metric": "em", "adapter_value": 0.5, "data": "d"}]
        )
    registry.add(adapter, "event", base=base, task="event")
    for version in (1, 2, 4):
        registry.set_alias("sql", "prod", version=version)
    registry.rollback("sql", "prod")
    registry.set_alias("event", "beta", version=1)
    registry.remove_alias("event", "beta")
    registry.pin("sql:3")
    registry.remove("sql:1")
    registry.sign("sql:4")
    return registry


def _dump(registry: AdapterRegistry) -> dict[str, list[tuple[object, ...]]]:
    connection = registry.store.read()
    tables = ("names", "versions", "removed", "tags", "metrics", "aliases", "journal")
    return {table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}


def test_a_sound_registry_has_no_problem(lived_in: AdapterRegistry) -> None:
    report = lived_in.examine()
    assert report.healthy and report.versions == 4 and report.notes == ()


def test_a_rebuild_gives_everything_back(lived_in: AdapterRegistry) -> None:
    before = _dump(lived_in)
    report = lived_in.rebuild()
    assert (report.versions, report.aliases, report.skipped) == (4, 1, ())
    assert _dump(lived_in) == before
    assert lived_in.examine().healthy
    assert lived_in.aliases("sql") == {"prod": 2}


def test_a_lost_or_garbled_database_is_rebuilt(lived_in: AdapterRegistry) -> None:
    before = _dump(lived_in)
    lived_in.close()
    path = lived_in.home / "registry.db"
    for name in ("registry.db-wal", "registry.db-shm"):
        (lived_in.home / name).unlink(missing_ok=True)
    content = path.read_bytes()
    path.write_bytes(b"\0garbage" * 512 + content[4096:])
    with pytest.raises(RegistryError, match="doctor --rebuild"):
        lived_in.resolve("sql")
    assert lived_in.rebuild().old_database is not None
    assert _dump(lived_in) == before
    path.unlink()
    lived_in.rebuild()
    assert _dump(lived_in) == before


@pytest.mark.parametrize("left", [None, b""])
def test_a_lost_database_is_not_taken_for_an_empty_one(
    left: bytes | None, lived_in: AdapterRegistry, adapter: Path, base: ResolvedBase
) -> None:
    """Otherwise numbers would begin again at 1, and the next manifest be written over an old one."""
    before, manifests = _dump(lived_in), {path: path.read_bytes() for path in lived_in.home.glob("manifests/*/*")}
    lived_in.close()
    for path in lived_in.home.glob("registry.db*"):
        path.unlink()
    if left is not None:
        (lived_in.home / "registry.db").write_bytes(left)
    for attempt in (
        lambda: lived_in.list(),
        lambda: lived_in.resolve("sql"),
        lambda: lived_in.add(adapter, "sql", base=base),
        lived_in.gc,
    ):
        with pytest.raises(RegistryError, match="doctor --rebuild"):
            attempt()
    assert {path: path.read_bytes() for path in lived_in.home.glob("manifests/*/*")} == manifests
    lived_in.rebuild()
    assert _dump(lived_in) == before


def test_a_database_that_nobody_has_begun_to_write_is_empty(registry: AdapterRegistry) -> None:
    """As a first `add` leaves it that was killed at its very beginning."""
    registry.home.mkdir(parents=True, exist_ok=True)
    (registry.home / "registry.db").touch()
    assert registry.list() == []
    assert registry.examine().healthy


def test_a_rebuild_that_dies_midway_leaves_a_database(
    lived_in: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one stays, whole, until the new one takes its name in one step."""
    before, replace = _dump(lived_in), Path.replace
    other = AdapterRegistry(lived_in.home)
    assert other.list(), "a second reader has the old one open"

    def die(self: Path, target: Path) -> Path:
        if target == lived_in.home / "registry.db":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        lived_in.rebuild()
    monkeypatch.undo()
    fresh = AdapterRegistry(lived_in.home)
    assert _dump(fresh) == before
    assert fresh.examine().healthy


def test_another_open_registry_sees_the_new_database(lived_in: AdapterRegistry) -> None:
    other = AdapterRegistry(lived_in.home)
    assert len(other.list()) == 4
    lived_in.rebuild()
    other.set_alias("sql", "prod", version=3)
    assert lived_in.aliases("sql") == {"prod": 3}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def _execute(registry: AdapterRegistry, sql: str) -> None:
    with sqlite3.connect(registry.home / "registry.db") as connection:
        connection.execute(sql)
    connection.close()


DAMAGE: dict[str, tuple[Callable[[AdapterRegistry], object], str]] = {
    "object": (lambda r: _flip(r.file(r.resolve("sql:4"), "adapter_model.safetensors")), "is damaged"),
    "lost object": (lambda r: r.file(r.resolve("sql:4"), "adapter_config.json").unlink(), "missing or damaged"),
    "manifest": (lambda r: _flip(r.home / "manifests" / "sql" / "3.json"), "differs from the database"),
    "lost manifest": (lambda r: (r.home / "manifests" / "sql" / "3.json").unlink(), "is missing"),
    "dangling alias": (lambda r: _execute(r, "UPDATE aliases SET version = 1"), "points at version 1"),
    "counter": (lambda r: _execute(r, "UPDATE names SET last_version = 1 WHERE name = 'sql'"), "counter of sql"),
    "journal": (lambda r: (r.home / "journal.jsonl").write_bytes(b""), "not in the journal"),
    "signature": (
        lambda r: _execute(r, "UPDATE versions SET signature = replace(signature, 'a', 'b') WHERE version = 4"),
        "not a signature",
    ),
    "manifest in the database": (
        lambda r: _execute(r, "UPDATE versions SET manifest = x'7b7d' WHERE version = 4"),
        "sql:4: adapterhub.json is not a manifest",
    ),
    "digest": (
        lambda r: _execute(r, f"UPDATE versions SET digest = 'sha256:{'0' * 64}' WHERE version = 4"),
        "disagree on what it is",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_found(kind: str, lived_in: AdapterRegistry) -> None:
    damage, expected = DAMAGE[kind]
    damage(lived_in)
    assert any(expected in problem for problem in lived_in.examine().problems), lived_in.examine()


def test_a_newer_schema_is_not_touched(lived_in: AdapterRegistry, adapter: Path, base: ResolvedBase) -> None:
    _execute(lived_in, "PRAGMA user_version = 2")
    before = (lived_in.home / "registry.db").read_bytes()
    newer = AdapterRegistry(lived_in.home)
    for attempt in (
        lambda: newer.resolve("sql"),
        lambda: newer.add(adapter, "sql", base=base),
        lambda: newer.set_alias("sql", "prod", version=2),
        newer.gc,
        newer.rebuild,
    ):
        with pytest.raises(SchemaVersionError, match="Upgrade adapterhub-lite"):
            attempt()
    assert (lived_in.home / "registry.db").read_bytes() == before
    assert not any((lived_in.home / "staging").iterdir())
    assert not list(lived_in.home.glob(".rebuild*"))
