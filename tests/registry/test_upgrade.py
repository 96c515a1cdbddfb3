"""A home that version 0.1 wrote (`home-0.1`, made by its own code) is read, used and repaired by this one."""

import shutil
from pathlib import Path

import pytest

from adapterhub_lite.errors import IntegrityError, RegistryError
from adapterhub_lite.registry import AdapterRegistry

OLD_HOME = Path(__file__).parent / "home-0.1"


@pytest.fixture
def upgraded(tmp_path: Path) -> AdapterRegistry:
    shutil.copytree(OLD_HOME, tmp_path / "home")
    return AdapterRegistry(tmp_path / "home")


def facts(registry: AdapterRegistry) -> dict[str, object]:
    return {
        "versions": [(m.reference, m.digest, m.task, m.tags) for m in registry.list()],
        "aliases": registry.aliases("sql"),
        "moves": [(move.alias, move.act, move.version) for move in registry.history("sql")],
        "measured": [one.metrics for one in registry.summaries("sql")],
        "pinned": registry.show("sql:1").pinned,
    }


def test_everything_of_an_old_home_is_there(upgraded: AdapterRegistry) -> None:
    found = facts(upgraded)
    assert [reference for reference, *_ in found["versions"]] == ["event:1", "sql:1", "sql:2"]  # type: ignore[attr-defined]
    assert found["aliases"] == {"next": 2, "prod": 1} and found["pinned"]
    assert [action for _, action, _ in found["moves"]] == ["set", "set", "rollback", "set"]  # type: ignore[attr-defined]
    assert upgraded.file(upgraded.resolve("sql@prod"), "adapter_model.safetensors", verify=True).is_file()
    # The number of a removed version is not given again.
    with upgraded.store.write() as connection:
        assert upgraded.store.next_version(connection, "event") == 3


def test_an_old_home_is_rebuilt_and_saved_as_it_is(upgraded: AdapterRegistry, tmp_path: Path) -> None:
    before = facts(upgraded)
    assert not upgraded.rebuild().skipped and facts(upgraded) == before
    upgraded.backup(tmp_path / "old.tar")
    back = AdapterRegistry(tmp_path / "back")
    back.restore(tmp_path / "old.tar")
    assert facts(back) == before
    # All that is said of it: how signatures were made then.
    for registry in (upgraded, back):
        assert [problem.split(": ")[0] for problem in registry.examine().problems] == ["sql:1"]


def test_what_an_old_version_cannot_do_is_said_with_the_way_out(upgraded: AdapterRegistry) -> None:
    with pytest.raises(IntegrityError, match="have it signed again"):
        upgraded.verify("sql:1")
    with pytest.raises(RegistryError, match="adapterhub-lite export sql:1 DIR"):
        upgraded.push("sql:1", "team/sql", endpoint="http://127.0.0.1:9")
