"""Each fault does to a client what it says, once, and leaves the hub itself as it was."""

import time

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from adapterhub_lite.hub_server import FAULT_KINDS, HubServer

REPO, TEXT = "org/model", b"0123456789"


@pytest.fixture
def file_url(api: HfApi, hub_server: HubServer) -> str:
    api.create_repo(REPO)
    api.create_commit(REPO, [CommitOperationAdd("a.txt", TEXT)], commit_message="m")
    hub_server.faults.clear()
    return f"{hub_server.url}/{REPO}/resolve/main/a.txt"


def faults_of(hub_server: HubServer, path: str, count: int) -> list[str]:
    """The faults of the exchanges about `path`, once there are `count`: an exchange is logged when it has ended."""
    deadline = time.monotonic() + 30
    while True:
        found = [exchange.fault for exchange in hub_server.faults.log if path in exchange.path]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_a_fault_strikes_as_often_as_ordered_and_is_logged(hub_server: HubServer, file_url: str, kind: str) -> None:
    rule = hub_server.faults.add(kind, "a.txt", times=2)  # type: ignore[arg-type]
    for left in (1, 0, 0):
        try:
            last = httpx.get(file_url).status_code
        except httpx.TransportError:
            last = 0
        assert rule.times == left
    assert last == 200
    assert faults_of(hub_server, "/a.txt", 3) == [kind, kind, ""]
    assert httpx.get(file_url).content == TEXT


def test_503_and_429_answer_instead_of_the_hub(hub_server: HubServer, file_url: str) -> None:
    hub_server.faults.add("503")
    assert httpx.get(file_url).status_code == 503
    hub_server.faults.add("429", seconds=7)
    limited = httpx.get(file_url)
    assert (limited.status_code, limited.headers["ratelimit"], limited.headers["retry-after"]) == (
        429,
        '"api";r=0;t=7',
        "7",
    )


def test_a_lost_response_is_lost_after_the_work_was_done(hub_server: HubServer, api: HfApi, file_url: str) -> None:
    hub_server.faults.add("lost_response", "/tag/")
    with pytest.raises(httpx.TransportError):
        httpx.post(f"{hub_server.url}/api/models/{REPO}/tag/main", json={"tag": "v1"})
    assert [ref.name for ref in api.list_repo_refs(REPO).tags] == ["v1"]


def test_cut_flipped_and_mislabelled_downloads(hub_server: HubServer, file_url: str) -> None:
    hub_server.faults.add("cut", "a.txt")
    with pytest.raises(httpx.TransportError), httpx.stream("GET", file_url) as answer:
        answer.read()
    hub_server.faults.add("flipped_byte", "a.txt")
    flipped = httpx.get(file_url).content
    assert sum(left != right for left, right in zip(flipped, TEXT, strict=True)) == 1
    hub_server.faults.add("wrong_etag", "a.txt")
    right, wrong = httpx.get(file_url), httpx.get(file_url)
    assert right.headers["etag"] != wrong.headers["etag"]
    assert right.content == wrong.content == TEXT


def test_slow_waits_first(hub_server: HubServer, file_url: str) -> None:
    hub_server.faults.add("slow", "a.txt", seconds=0.3)
    started = time.monotonic()
    assert httpx.get(file_url).content == TEXT
    assert time.monotonic() - started >= 0.3


def test_a_stale_listing_shows_the_branch_before_its_last_commit(
    api: HfApi, hub_server: HubServer, file_url: str
) -> None:
    head, first = [commit.commit_id for commit in api.list_repo_commits(REPO)]
    hub_server.faults.add("stale_listing", "/revision/main")
    assert [api.model_info(REPO, revision="main").sha for _ in range(2)] == [first, head]
    hub_server.faults.add("stale_listing", "/revision/")
    assert api.model_info(REPO, revision=head).sha == head, "a commit by its id is never stale"


def test_rules_choose_by_method_and_path(hub_server: HubServer, file_url: str) -> None:
    hub_server.faults.add("503", r"\.txt$", method="HEAD")
    assert httpx.get(file_url).status_code == 200
    assert httpx.get(f"{hub_server.url}/api/models").status_code == 200
    assert httpx.head(file_url).status_code == 503
