"""Whatever the network does: a publish happens exactly once, a pull is what was published or an error."""

import time
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import HubUnreachableError, IntegrityError, UnknownNameError
from adapterhub_lite.hub_server import FAULT_KINDS, HubServer
from adapterhub_lite.hub_server.faults import FaultKind
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import HubRepo

REPO = "org/sql-lora"
COMMIT, TAG, INFO, WEIGHTS = "/commit/main", "/tag/", "/revision/main", "/resolve/.*safetensors"


@pytest.fixture(autouse=True)
def classic_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights over HTTP, where the faults are; Xet's own files are not reached by them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


@pytest.fixture
def elsewhere(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "elsewhere")


@pytest.fixture
def published(registry: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer) -> str:
    """One version that was published in fair weather; its commit."""
    registry.add(adapter, "sql", base=base)
    return str(registry.push("sql", REPO, endpoint=hub_server.url).commit)


def history(hub: HubServer) -> tuple[list[str], dict[str, str]]:
    """(titles of the commits on main, newest first; tag -> commit), as the hub has them after the storm."""
    hub.faults.clear()
    repo = HubRepo(REPO, endpoint=hub.url)
    log = repo.log(repo.head())
    return [commit.text.splitlines()[0] for commit in log], repo.tags()


# One of each sort runs always; the rest of the table with the slow tests.
ALWAYS = {("lost_response", COMMIT), ("stale_listing", INFO), ("flipped_byte", WEIGHTS), ("cut", WEIGHTS), ("503", TAG)}


def table(rows: list[tuple[FaultKind, str, str]]) -> list[Any]:
    return [pytest.param(*row, marks=[] if row[:2] in ALWAYS else pytest.mark.slow) for row in rows]


PUSH_FAULTS: list[tuple[FaultKind, str, str]] = [
    *((kind, COMMIT, "POST") for kind in FAULT_KINDS if kind != "stale_listing"),
    *((kind, TAG, "POST") for kind in ("503", "lost_response", "cut")),
    *((kind, INFO, "GET") for kind in ("503", "429", "lost_response", "cut", "flipped_byte", "stale_listing")),
    ("503", "/lfs/", "PUT"),
    ("lost_response", "/lfs/", "PUT"),
    ("stale_listing", "/preupload/", "POST"),
    ("stale_listing", "/commits/", "GET"),
    ("lost_response", "/repos/create", "POST"),
]


@pytest.mark.parametrize(("kind", "path", "method"), table(PUSH_FAULTS))
def test_a_push_through_a_fault_is_published_exactly_once(
    registry: AdapterRegistry,
    elsewhere: AdapterRegistry,
    adapter: Path,
    other_adapter: Path,
    base: ResolvedBase,
    hub_server: HubServer,
    kind: FaultKind,
    path: str,
    method: str,
) -> None:
    registry.add(adapter, "sql", base=base)
    wanted = registry.add(other_adapter, "sql", base=base)
    if "create" not in path:
        registry.push("sql:1", REPO, endpoint=hub_server.url)
    fault = hub_server.faults.add(kind, path, method=method, seconds=0.2)
    receipt = registry.push("sql:2", REPO, endpoint=hub_server.url)
    assert fault.times == 0, "the fault never struck"
    titles, tags = history(hub_server)
    assert titles.count("sql v2") == 1
    assert tags["v2"] == receipt.commit
    assert elsewhere.pull(REPO, revision="v2", endpoint=hub_server.url).manifest.published() == wanted


def test_an_answer_that_makes_no_sense_is_no_answer(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    """The flipped byte falls into the name of a key that the client reads; the commit landed all the same."""
    registry.add(adapter, "sql", base=base)
    hub_server.faults.add("flipped_byte", COMMIT, method="POST")
    assert registry.push("sql", "org/large", endpoint=hub_server.url).commits_sent == 1
    repo = HubRepo("org/large", endpoint=hub_server.url)
    assert len(repo.log(repo.head())) == 2


def test_a_push_that_died_between_commit_and_tag_is_finished_by_the_next(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    registry.add(adapter, "sql", base=base)
    hub_server.faults.add("503", TAG, times=99)
    with pytest.raises(HubUnreachableError):
        registry.push("sql", REPO, endpoint=hub_server.url)
    titles, tags = history(hub_server)
    assert (titles.count("sql v1"), tags) == (1, {})
    assert registry.push("sql", REPO, endpoint=hub_server.url).uploaded is False
    titles, tags = history(hub_server)
    assert (titles.count("sql v1"), set(tags)) == (1, {"v1"})


def test_a_hub_that_stays_away_is_given_up_on_and_nothing_is_half_visible(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    registry.add(adapter, "sql", base=base)
    hub_server.faults.add("503", INFO, times=999)
    with pytest.raises(HubUnreachableError, match="503"):
        registry.push("sql", REPO, endpoint=hub_server.url)
    assert history(hub_server) == (["initial commit"], {})


def test_a_file_that_the_client_left_out_for_an_old_listing_is_noticed(
    registry: AdapterRegistry,
    elsewhere: AdapterRegistry,
    adapter: Path,
    other_adapter: Path,
    base: ResolvedBase,
    hub_server: HubServer,
) -> None:
    """The weights of v1 come back as v3 (another rank in between): an old listing says they are there already."""
    for folder in (adapter, other_adapter):
        registry.add(folder, "sql", base=base)
    registry.push("sql:1", REPO, endpoint=hub_server.url)
    repo = HubRepo(REPO, endpoint=hub_server.url)
    card = repo.read(repo.head(), "adapter_config.json", size=1 << 16)
    repo.commit(repo.head(), "by hand", "", {"adapter_config.json": b"{}"}, [])
    hub_server.faults.add("stale_listing", "/preupload/", method="POST")
    registry.push("sql:2", REPO, endpoint=hub_server.url)
    assert repo.read(repo.tags()["v2"], "adapter_config.json", size=1 << 16) == card
    assert elsewhere.pull(REPO, revision="v2", endpoint=hub_server.url).manifest.published().version == 2


PULL_FAULTS: list[tuple[FaultKind, str, str]] = [
    *((kind, WEIGHTS, "GET") for kind in ("503", "429", "cut", "slow", "flipped_byte")),
    *((kind, WEIGHTS, "HEAD") for kind in ("503", "wrong_etag", "slow")),
    *((kind, "/resolve/.*adapterhub.json", "GET") for kind in ("cut", "flipped_byte", "wrong_etag", "lost_response")),
    *((kind, "/revision/v1", "GET") for kind in ("503", "429", "lost_response", "cut", "slow", "flipped_byte")),
    *((kind, "/refs", "GET") for kind in ("503", "cut", "stale_listing")),
]


@pytest.mark.parametrize(("kind", "path", "method"), table(PULL_FAULTS))
def test_a_pull_through_a_fault_brings_what_was_published(
    registry: AdapterRegistry,
    elsewhere: AdapterRegistry,
    published: str,
    hub_server: HubServer,
    kind: FaultKind,
    path: str,
    method: str,
) -> None:
    fault = hub_server.faults.add(kind, path, method=method, seconds=0.2)
    receipt = elsewhere.pull(REPO, endpoint=hub_server.url)
    assert fault.times == 0, "the fault never struck"
    assert (receipt.manifest.published(), receipt.commit) == (registry.resolve("sql"), published)
    name = "adapter_model.safetensors"
    assert elsewhere.file(receipt.manifest, name).read_bytes() == registry.file(receipt.manifest, name).read_bytes()


@pytest.mark.parametrize("path", [WEIGHTS, "/resolve/.*adapterhub.json"])
def test_bytes_that_stay_wrong_never_get_in(
    elsewhere: AdapterRegistry, published: str, hub_server: HubServer, path: str
) -> None:
    hub_server.faults.add("flipped_byte", path, method="GET", times=99)
    with pytest.raises(IntegrityError):
        elsewhere.pull(REPO, endpoint=hub_server.url)
    with pytest.raises(UnknownNameError):
        elsewhere.resolve(REPO.rpartition("/")[2])
    assert not list((elsewhere.home / "hub").glob("*/")), "wrong bytes are not kept for the next try"


def test_a_stale_branch_is_noticed_and_never_a_cached_copy_used(
    elsewhere: AdapterRegistry, published: str, hub_server: HubServer
) -> None:
    repo = HubRepo(REPO, endpoint=hub_server.url)
    hub_server.faults.add("stale_listing", INFO, method="GET", times=1)
    assert repo.head("main") == published
    assert elsewhere.pull(REPO, endpoint=hub_server.url).source == "hub"
    hub_server.faults.add("503", "", times=999)
    with pytest.raises(HubUnreachableError):
        elsewhere.pull(REPO, endpoint=hub_server.url)


def test_files_that_arrived_are_not_fetched_again_after_an_interruption(
    elsewhere: AdapterRegistry, published: str, hub_server: HubServer
) -> None:
    def interrupt(step: str) -> None:
        if "safetensors" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        elsewhere.pull(REPO, endpoint=hub_server.url, progress=interrupt)
    assert [path.parent for path in elsewhere.plan_gc().leftovers] == [elsewhere.home / "hub"], "gc would sweep it"
    # An exchange is logged when it has ended, which may be after the client went on.
    deadline = time.monotonic() + 30
    while not any(one.path.endswith("/adapter_config.json") and one.method == "GET" for one in hub_server.faults.log):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hub_server.faults.log.clear()
    assert elsewhere.pull(REPO, endpoint=hub_server.url).source == "hub"
    fetched = [
        one.path.rpartition("/")[2] for one in hub_server.faults.log if "/resolve/" in one.path and one.method == "GET"
    ]
    assert fetched == ["adapter_model.safetensors"]


def test_what_a_pull_left_that_was_broken_off_is_swept_and_a_running_one_is_left_alone(
    elsewhere: AdapterRegistry, published: str, hub_server: HubServer
) -> None:
    swept = []

    def interrupt(step: str) -> None:
        if "safetensors" in step:
            elsewhere.gc()
            swept.append(not list((elsewhere.home / "hub").glob("*/adapterhub.json")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        elsewhere.pull(REPO, endpoint=hub_server.url, progress=interrupt)
    assert swept == [False], "while it runs"
    elsewhere.gc()
    assert not list((elsewhere.home / "hub").glob("*/"))
    assert elsewhere.examine().notes == ()
