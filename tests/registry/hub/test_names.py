"""Names are local: what a publisher calls an adapter, its version and its aliases are facts here and decide nothing."""

import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from adapterhub_lite.adapter_format.manifest import OriginRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import RegistryError, UnknownNameError, UsageError
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry

REPO = "mallory/nice-poems"
HIGHEST = 999_999_999


@pytest.fixture
def api(hub_server: HubServer) -> HfApi:
    return HfApi(endpoint=hub_server.url, token=False)


@pytest.fixture
def mallory(other_adapter: Path, base: ResolvedBase, tmp_path: Path) -> AdapterRegistry:
    found = AdapterRegistry(tmp_path / "mallory")
    found.add(other_adapter, "sql", base=base)
    return found


def publish(api: HfApi, mallory: AdapterRegistry, repo: str, version: int) -> str:
    """Mallory's adapter with the labels of her choice, and `prod` pointing at it; returns the commit."""
    manifest = mallory.resolve("sql:1").model_copy(
        update={"version": version, "origin": OriginRecord(repo_id="org/known", name="event", version=1)}
    )
    files = {name: mallory.file(manifest, name).read_bytes() for name in manifest.files}
    files |= {"adapterhub.json": manifest.to_bytes(), "aliases.json": json.dumps({"prod": version}).encode()}
    api.create_repo(repo, exist_ok=True)
    done = api.create_commit(repo, [CommitOperationAdd(n, c) for n, c in files.items()], commit_message="x")
    api.create_tag(repo, tag=f"v{version}", revision=done.oid)
    return str(done.oid)


def test_a_stranger_chooses_no_name_no_version_and_no_alias(
    registry: AdapterRegistry, mallory: AdapterRegistry, adapter: Path, base: ResolvedBase, api: HfApi
) -> None:
    ours = registry.add(adapter, "sql", base=base)
    registry.set_alias("sql", "prod", version=1)
    commit = publish(api, mallory, REPO, HIGHEST)
    for revision in (None, "@prod", f"v{HIGHEST}", "main", commit):
        taken = registry.pull(REPO, revision=revision, endpoint=api.endpoint).manifest
        assert taken.reference == "nice-poems:1"
    assert taken.origin == OriginRecord(repo_id=REPO, commit=commit, name="sql", version=HIGHEST, aliases=("prod",))
    assert registry.resolve("sql") == registry.resolve("sql@prod") == ours
    assert len(registry.history("sql")) == 1 and registry.history("nice-poems") == []
    assert registry.add(adapter, "nice-poems", base=base).version == 2
    registry.rebuild()
    assert registry.resolve("nice-poems:1") == taken and registry.examine().problems == ()


def test_the_name_of_a_repository_adds_to_no_adapter_of_ours(
    registry: AdapterRegistry, mallory: AdapterRegistry, adapter: Path, base: ResolvedBase, api: HfApi
) -> None:
    ours = registry.add(adapter, "sql", base=base)
    publish(api, mallory, "mallory/sql", 1)
    with pytest.raises(UsageError, match="did not come from mallory/sql"):
        registry.pull("mallory/sql", endpoint=api.endpoint)
    assert registry.list() == [ours]
    assert registry.pull("mallory/sql", name="sql", endpoint=api.endpoint).manifest.reference == "sql:2"
    assert registry.pull("mallory/sql", endpoint=api.endpoint).source == "store", "what is here already is no question"


@pytest.mark.parametrize("name", ["base", "CON", "nul", "com1.x", "sql.", "SQL", "a/b", "-x", "x" * 65])
def test_names_that_could_be_mistaken_are_refused_at_every_door(
    registry: AdapterRegistry, mallory: AdapterRegistry, adapter: Path, base: ResolvedBase, api: HfApi, name: str
) -> None:
    registry.add(adapter, "sql", base=base)
    publish(api, mallory, REPO, 1)
    for attempt in (
        lambda: registry.add(adapter, name, base=base),
        lambda: registry.pull(REPO, name=name, endpoint=api.endpoint),
    ):
        with pytest.raises(UsageError):
            attempt()
    assert [m.reference for m in registry.list()] == ["sql:1"]
    assert not any((registry.home / "staging").iterdir())


def test_a_repository_that_is_called_like_a_reserved_word_needs_a_name(
    registry: AdapterRegistry, mallory: AdapterRegistry, api: HfApi
) -> None:
    publish(api, mallory, "mallory/base", 1)
    with pytest.raises(UsageError, match="--name"):
        registry.pull("mallory/base", endpoint=api.endpoint)
    assert registry.pull("mallory/base", name="poems", endpoint=api.endpoint).manifest.reference == "poems:1"


def test_a_name_that_has_used_up_its_numbers_says_so(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase
) -> None:
    registry.add(adapter, "sql", base=base)
    with registry.store.write() as connection:
        connection.execute("UPDATE names SET last_version = ?", [HIGHEST])
    with pytest.raises(RegistryError, match="used up its version numbers"):
        registry.add(adapter, "sql", base=base)
    assert registry.add(adapter, "other", base=base).version == 1


def test_branches_are_pulled_and_a_branch_that_is_a_tag_too_is_refused(
    registry: AdapterRegistry, mallory: AdapterRegistry, api: HfApi
) -> None:
    first = publish(api, mallory, REPO, 1)
    api.create_branch(REPO, branch="try/this", revision=first)
    receipt = registry.pull(REPO, revision="try/this", endpoint=api.endpoint)
    assert (receipt.commit, receipt.manifest.reference) == (first, "nice-poems:1")
    second = api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id=REPO).oid
    api.create_branch(REPO, branch="v1", revision=second)
    with pytest.raises(UsageError, match="is a branch and a tag, at two commits"):
        registry.pull(REPO, revision="v1", endpoint=api.endpoint)
    for missing in ("refs/pr/7", "no/such"):
        with pytest.raises(UnknownNameError, match="no such revision"):
            registry.pull(REPO, revision=missing, endpoint=api.endpoint)


def test_a_lock_brings_back_its_own_labels(
    registry: AdapterRegistry, mallory: AdapterRegistry, adapter: Path, base: ResolvedBase, api: HfApi, tmp_path: Path
) -> None:
    """What was pulled is locked by commit and needs no source; names and numbers are those of the lock's owner."""
    from adapterhub_lite.registry.hub.pull import pull_locked
    from adapterhub_lite.registry.operations.lock import write_lock

    registry.add(adapter, "poems", base=base)
    commit = publish(api, mallory, REPO, 4)
    assert registry.pull(REPO, name="poems", endpoint=api.endpoint).manifest.reference == "poems:2"
    lock = write_lock(registry.store, ["poems"], tmp_path / "adapters.lock", bases=[base])
    assert (lock.adapters[0].source, lock.adapters[0].revision) == (REPO, commit)
    there = AdapterRegistry(tmp_path / "there")
    (came,) = pull_locked(there.store, lock, endpoint=api.endpoint, bases=[base])
    assert (came.reference, came.digest) == ("poems:2", registry.resolve("poems:2").digest)


def test_a_pulled_version_is_pushed_on_under_its_name_here(
    registry: AdapterRegistry, mallory: AdapterRegistry, adapter: Path, base: ResolvedBase, api: HfApi, tmp_path: Path
) -> None:
    publish(api, mallory, REPO, 4)
    registry.pull(REPO, name="poems", endpoint=api.endpoint)
    assert registry.push("poems", "ann/poems", endpoint=api.endpoint).tag == "v1"
    again = AdapterRegistry(tmp_path / "third").pull("ann/poems", endpoint=api.endpoint).manifest
    assert again.origin is not None and (again.origin.repo_id, again.origin.name) == ("ann/poems", "poems")
