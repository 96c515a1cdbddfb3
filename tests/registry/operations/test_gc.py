"""Pins, removal and collection: nothing in use is freed, and what is freed was announced."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.adapter_format.manifest import ParentRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import IntegrityError, RegistryError, ResourceError, UnknownNameError, UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.export import adapter_files
from adapterhub_lite.registry.operations.intake import import_adapter


@pytest.fixture(scope="session")
def six(make_adapter: Any) -> list[Path]:
    return [make_adapter(seed=10 + i) for i in range(6)]


def test_gc_keeps_what_anything_refers_to(registry: AdapterRegistry, six: list[Path], base: ResolvedBase) -> None:
    first = registry.add(six[0], "sql", base=base)
    for folder in six[1:5]:
        registry.add(folder, "sql", base=base)
    merged = ParentRecord(reference="sql:1", digest=first.digest, weight=1.0)
    registry.add(six[5], "sql", base=base, parents=(merged,))
    registry.set_alias("sql", "prod", version=2)
    registry.pin("sql:3")
    with registry.hold("sql:4") as lease:
        assert lease.effective
        plan = registry.plan_gc()
        assert plan.versions == ("sql:5",)
        assert {name: reason.split(" ")[0] for name, reason in plan.kept.items()} == {
            "sql:1": "parent", "sql:2": "alias", "sql:3": "pinned", "sql:4": "held", "sql:6": "among",
        }  # fmt: skip
        before = sum(path.stat().st_size for _, path in registry.store.objects)
        assert len(registry.list()) == 6, "a plan changes nothing"
        assert registry.gc() == plan
        assert before - sum(path.stat().st_size for _, path in registry.store.objects) == plan.freed_bytes > 0
    assert registry.examine().problems == ()
    registry.unpin("sql:3")
    assert registry.gc().versions == ("sql:3", "sql:4")
    with pytest.raises(UnknownNameError, match="was removed; its number is not used again"):
        registry.resolve("sql:5")


def test_only_what_was_announced_goes(registry: AdapterRegistry, six: list[Path], base: ResolvedBase) -> None:
    registry.add(six[0], "sql", base=base)
    registry.add(six[1], "sql", base=base)
    announced = registry.plan_gc()
    registry.add(six[2], "sql", base=base)
    assert registry.plan_gc().versions == ("sql:1", "sql:2")
    done = registry.gc(announced=announced)
    assert (done.versions, done.kept["sql:2"]) == (("sql:1",), "not announced")
    assert [m.version for m in registry.list()] == [2, 3]
    assert registry.examine().problems == registry.examine().notes == ()


def test_nothing_is_deleted_before_the_versions_are_gone_for_good(
    registry: AdapterRegistry, six: list[Path], base: ResolvedBase
) -> None:
    """The journal cannot be written, as on a full disk: the collection fails, and every byte is where it was."""
    manifests = [registry.add(folder, "sql", base=base) for folder in six[:3]]
    (registry.home / "journal.jsonl").mkdir()
    for act in (registry.gc, lambda: registry.remove("sql:1")):
        with pytest.raises(ResourceError):
            act()
    (registry.home / "journal.jsonl").rmdir()
    assert registry.list() == manifests
    assert all(registry.file(m, name).is_file() for m in manifests for name in m.files)
    assert registry.examine().problems == registry.examine().notes == ()


def test_numbers_are_never_given_again(registry: AdapterRegistry, six: list[Path], base: ResolvedBase) -> None:
    registry.add(six[0], "sql", base=base)
    registry.add(six[1], "sql", base=base)
    registry.remove("sql:2")
    assert registry.add(six[2], "sql", base=base).version == 3
    registry.remove("sql:1")
    registry.remove("sql:3")
    registry.rebuild()
    assert registry.list() == []
    assert registry.add(six[0], "sql", base=base).version == 4


def test_what_is_in_use_is_not_removed(registry: AdapterRegistry, six: list[Path], base: ResolvedBase) -> None:
    registry.add(six[0], "sql", base=base)
    registry.set_alias("sql", "prod", version=1)
    with pytest.raises(RegistryError, match="alias prod"):
        registry.remove("sql:1")
    registry.remove_alias("sql", "prod")
    registry.pin("sql")
    with pytest.raises(RegistryError, match="pinned"):
        registry.remove("sql:1")
    registry.unpin("sql")
    with registry.hold("sql"), pytest.raises(RegistryError, match="running server"):
        registry.remove("sql:1")
    with pytest.raises(UsageError, match="as 'name:3'"):
        registry.remove("sql")
    registry.remove("sql:1")
    with pytest.raises(UnknownNameError):
        registry.hold("sql")
    with pytest.raises(UsageError, match="keep_newest"):
        registry.gc(keep_newest=-1)


def test_shared_files_stay_while_one_version_needs_them(
    registry: AdapterRegistry, six: list[Path], base: ResolvedBase
) -> None:
    registry.add(six[0], "one", base=base)
    kept = registry.add(six[0], "two", base=base)
    registry.remove("one:1")
    assert registry.gc().objects == ()
    assert registry.file(kept, "adapter_model.safetensors").is_file()


def test_a_dead_server_holds_nothing(registry: AdapterRegistry, six: list[Path], base: ResolvedBase) -> None:
    registry.add(six[0], "sql", base=base)
    registry.add(six[1], "sql", base=base)
    code = (
        "import sys; from adapterhub_lite.registry import AdapterRegistry; lease = AdapterRegistry().hold('sql:1');"
        "print('held', flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "held\n"
    assert registry.show("sql:1").held
    assert registry.plan_gc().versions == ()
    os.kill(server.pid, signal.SIGKILL)
    server.communicate()
    assert not registry.show("sql:1").held
    assert registry.gc().versions == ("sql:1",)
    assert not any((registry.home / "leases").iterdir())


FORKING = """
import os
from adapterhub_lite.registry import AdapterRegistry
lease = AdapterRegistry().hold("sql:1")
child = os.fork()
if child == 0:
    lease.release()
    os._exit(0)
os.waitpid(child, 0)
print(AdapterRegistry().show("sql:1").held)
"""


def test_a_process_forked_from_a_server_does_not_end_its_lease(
    registry: AdapterRegistry, six: list[Path], base: ResolvedBase
) -> None:
    registry.add(six[0], "sql", base=base)
    assert subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True).stdout == "True\n"


def test_leftovers_of_a_crash_are_swept(registry: AdapterRegistry, six: list[Path], base: ResolvedBase) -> None:
    manifest = registry.add(six[0], "sql", base=base)
    (registry.home / "staging" / "dead").mkdir()
    (registry.home / "manifests" / "sql" / "2.json").write_bytes(b"{}")
    (registry.home / "manifests" / "sql" / ".3.json.x.tmp").write_bytes(b"half")
    stray = registry.store.objects.path("ab" + "0" * 62)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"half")
    assert len(registry.plan_gc().leftovers) == 3
    registry.gc()
    assert registry.plan_gc().leftovers == registry.plan_gc().objects == ()
    assert registry.examine().notes == registry.examine().problems == ()
    assert registry.resolve("sql") == manifest


def test_a_removed_version_may_come_back_as_itself(
    registry: AdapterRegistry, six: list[Path], base: ResolvedBase, tmp_path: Path
) -> None:
    manifest = registry.add(six[0], "sql", base=base)
    folder = registry.export("sql", tmp_path / "parcel")
    registry.remove("sql:1")
    registry.gc()
    with pytest.raises(IntegrityError):
        adapter_files(registry.store, manifest)
    assert import_adapter(registry.store, folder, base=base, name="sql", version=1).published() == manifest
    registry.rebuild()
    assert registry.resolve("sql:1").published() == manifest
    assert registry.examine().problems == ()
