"""A crash at any instant loses nothing acknowledged and leaves nothing half-visible; nor do crowds, nor full disks."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ResourceError
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.store.journal import record_act

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def adapters_folder(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(3):
        make_adapter(seed=40 + seed).rename(folder / str(seed))
    return folder


@pytest.fixture
def parcel(adapter: Path, base: ResolvedBase, tmp_path: Path) -> Path:
    """A published folder, for pulling."""
    elsewhere = AdapterRegistry(tmp_path / "elsewhere")
    elsewhere.add(adapter, "pulled", base=base)
    return elsewhere.export("pulled", tmp_path / "parcel")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_sigkill_at_random_instants(
    kills: int, home: Path, parcel: Path, adapters_folder: Path, base: ResolvedBase
) -> None:
    command = [sys.executable, str(HERE / "kill_driver.py"), home, parcel, adapters_folder, base.folder, kills, 0]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["acts"] > 0 and sum(found["interrupted"].values()) > kills // 3, found
    assert kills < 200 or {"add", "alias", "pull", "gc"} <= set(found["interrupted"]), found


@pytest.mark.parametrize("earlier", [False, True], ids=["the first act", "after others"])
@pytest.mark.parametrize("act", ["remove", "alias"])
def test_an_act_that_died_before_its_commit_is_no_act_once_it_is_swept(
    act: str, earlier: bool, registry: AdapterRegistry, adapters_folder: Path, base: ResolvedBase
) -> None:
    """Its line is on disk; a rebuild would take the version away, or move the alias, that everybody still sees."""
    for folder in sorted(adapters_folder.iterdir()):
        registry.add(folder, "sql", base=base)
    if earlier:
        registry.set_alias("sql", "prod", version=1)
    before = registry.list(), registry.aliases("sql")

    class Killed(BaseException):
        pass

    with contextlib.suppress(Killed), registry.store.write() as connection:
        what = {"act": "remove", "digest": before[0][1].digest} if act == "remove" else {"act": "set", "alias": "prod"}
        record_act(connection, registry.home, name="sql", version=2, **what)
        raise Killed
    assert (registry.list(), registry.aliases("sql")) == before
    registry.gc(keep_newest=10)
    registry.rebuild()
    assert (registry.list(), registry.aliases("sql")) == before
    registry.set_alias("sql", "prod", version=3)
    report = registry.examine()
    assert report.problems == report.notes == ()


def test_what_was_acknowledged_outlives_a_power_cut(
    tmp_path: Path, adapter: Path, base: ResolvedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file's bytes, and every name on the way to it, were fsynced: SIGKILL alone would not tell."""
    synced: dict[int, set[str]] = {}
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        synced[inode] = set(os.listdir(descriptor)) if Path(f"/proc/self/fd/{descriptor}").is_dir() else set()

    monkeypatch.setattr(os, "fsync", recorded)
    registry = AdapterRegistry(tmp_path / "some" / "home")
    registry.add(adapter, "sql", base=base)
    registry.set_alias("sql", "prod", version=1)
    places = [registry.home / place for place in ("objects", "manifests", "journal.jsonl", "registry.db")]
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    assert len(files) == 5, "two objects, a manifest, the journal, the database"
    for path in files:
        # SQLite waits for its own file, out of our sight.
        assert path.name == "registry.db" or path.stat().st_ino in synced, path
        while path != tmp_path:
            assert path.name in synced.get(path.parent.stat().st_ino, ()), f"the name of {path} may be lost"
            path = path.parent


CROWD = """
import sys
from pathlib import Path
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AliasConflictError
from adapterhub_lite.registry import AdapterRegistry
registry = AdapterRegistry(); base = ResolvedBase("tiny", "tiny", Path(sys.argv[1]))
sys.stdin.readline()
won = 0
for folder in sorted(Path(sys.argv[2]).iterdir()):
    manifest = registry.add(folder, "sql", base=base)
    while True:
        current = registry.aliases("sql").get("prod", 0)
        try:
            registry.set_alias("sql", "prod", version=manifest.version, expect=current)
            break
        except AliasConflictError:
            pass
    print(manifest.version, current)
"""


SWEEPER = """
import time
from adapterhub_lite.errors import RegistryError
from adapterhub_lite.registry import AdapterRegistry
registry = AdapterRegistry()
print("ready", flush=True)
while True:
    try:
        assert registry.gc(keep_newest=1000).versions == ()
    except RegistryError as error:
        assert "busy" in str(error)  # sixteen who add leave no gap for a minute
    time.sleep(0.05)  # and one who collects without a pause would leave them none
"""


@pytest.fixture
def sweeper() -> Iterator[None]:
    """A process that collects garbage all the time; stopped at the end, when it must still be alive."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield
    alive = process.poll() is None
    process.kill()
    assert alive, process.communicate()[1]
    process.communicate()


@pytest.mark.usefixtures("sweeper")
def test_sixteen_processes_at_once(registry: AdapterRegistry, adapters_folder: Path, base: ResolvedBase) -> None:
    assert base.fingerprint
    command = [sys.executable, "-c", CROWD, str(base.folder), str(adapters_folder)]
    crowd = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(16)
    ]
    results = []
    for process in crowd:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in crowd:
        out, err = process.communicate()
        assert process.returncode == 0, err
        results += [tuple(int(word) for word in line.split()) for line in out.splitlines()]
    versions = sorted(version for version, _ in results)
    assert versions == list(range(1, 49)), "every number once"
    assert [m.version for m in registry.list("sql")] == versions
    # Every move started where another ended: compare-and-swap lost none.
    moves = [(move.version, move.previous or 0) for move in registry.history("sql", "prod")]
    assert sorted(moves) == sorted(results)
    assert all(after[1] == before[0] for before, after in pairwise(moves))
    assert registry.examine().problems == ()


def _mounted(kind: list[str], folder: Path) -> bool:
    return os.geteuid() == 0 and subprocess.run(["mount", *kind, str(folder)], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if not _mounted(["-t", "tmpfs", "-o", "size=2m", "tmpfs"], folder):
        pytest.skip("mounting a small disk wants root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_changes_nothing(small_disk: Path, adapter: Path, other_adapter: Path, base: ResolvedBase) -> None:
    registry = AdapterRegistry(small_disk)
    first = registry.add(adapter, "sql", base=base)
    registry.set_alias("sql", "prod", version=1)
    filler = small_disk / "filler"
    # From no room at all to almost enough: the disk is full at every stage of an add.
    refused = 0
    for spare in range(0, 200_000, 8192):
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        with filler.open("r+b") as file:
            file.truncate(max(0, filler.stat().st_size - spare))
        try:
            registry.add(other_adapter, "sql", base=base)
        except ResourceError as error:
            refused += 1
            assert "full" in str(error)
        filler.unlink()
        assert registry.resolve("sql:1") == first
        assert registry.aliases("sql") == {"prod": 1}
        assert registry.examine().problems == ()
        if len(registry.list()) > 1:
            break
        registry.gc()
    assert refused > 1
    assert registry.add(other_adapter, "sql", base=base).digest != first.digest


LIMITED = """
import resource, sys
from pathlib import Path
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ResourceError
from adapterhub_lite.registry import AdapterRegistry
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    AdapterRegistry().add(sys.argv[2], "sql", base=ResolvedBase("tiny", "tiny", Path(sys.argv[1])))
except ResourceError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 2000, 12_000])
def test_a_quota_changes_nothing(
    limit: int, registry: AdapterRegistry, adapter: Path, other_adapter: Path, base: ResolvedBase
) -> None:
    first = registry.add(adapter, "sql", base=base)
    command = [sys.executable, "-c", LIMITED, str(base.folder), str(other_adapter), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "is full" in done.stdout, done
    assert registry.list() == [first]
    assert registry.examine().problems == ()


@pytest.fixture
def read_only(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> Iterator[AdapterRegistry]:
    """A home with one version that cannot be written to: mounted so for root, by its mode for others."""
    registry.add(adapter, "sql", base=base)
    registry.set_alias("sql", "prod", version=1)
    registry.close()
    home = registry.home
    if os.geteuid() == 0:
        if not _mounted(["--bind", str(home)], home) or not _mounted(["-o", "remount,ro,bind"], home):
            pytest.skip("root that may not mount can write everywhere")
        yield AdapterRegistry(home)
        subprocess.run(["umount", "--lazy", str(home)], check=True)
    else:
        home.chmod(0o500)
        yield AdapterRegistry(home)
        home.chmod(0o700)


def test_a_read_only_home_can_be_read_and_says_so(
    read_only: AdapterRegistry, other_adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    manifest = read_only.resolve("sql@prod")
    assert read_only.list() == [manifest]
    assert read_only.export("sql", tmp_path / "out").is_dir()
    with read_only.hold("sql") as lease:
        assert not lease.effective
    assert read_only.examine().problems == ()
    for attempt in (
        lambda: read_only.add(other_adapter, "sql", base=base),
        lambda: read_only.set_alias("sql", "best", version=1),
        lambda: read_only.pin("sql"),
        read_only.gc,
    ):
        with pytest.raises(ResourceError, match="cannot be written to"):
            attempt()
    assert read_only.aliases("sql") == {"prod": 1}


def test_a_pull_into_a_read_only_home_says_so(
    read_only: AdapterRegistry, other_adapter: Path, base: ResolvedBase, hub_server: HubServer, tmp_path: Path
) -> None:
    elsewhere = AdapterRegistry(tmp_path / "elsewhere")
    elsewhere.add(other_adapter, "event", base=base)
    elsewhere.push("event", "org/event", endpoint=hub_server.url)
    with pytest.raises(ResourceError, match=r"Could not pull org/event: .* cannot be written to"):
        read_only.pull("org/event", endpoint=hub_server.url)
    # What is there can be published from there.
    assert read_only.push("sql", "org/sql", endpoint=hub_server.url).uploaded
