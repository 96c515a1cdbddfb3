"""The unmodified client against the hub: everything that goes up comes down, byte for byte."""

import base64
import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapterhub_lite.hub_server import HubServer
from tests.xet import need_xet

REPO = "org/model"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts and path.name != ".gitattributes"
    }


def test_a_folder_goes_up_and_down_unchanged(
    api: HfApi, hub_server: HubServer, some_folder: Path, tmp_path: Path, transfer: str
) -> None:
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=some_folder)
    api.create_tag(REPO, tag="v1", revision=commit.oid)
    found = snapshot_download(REPO, revision="v1", endpoint=hub_server.url, token=False, cache_dir=tmp_path / "cache")
    assert contents(Path(found)) == contents(some_folder)
    moved = [exchange.path for exchange in hub_server.faults.log if exchange.method == "PUT"]
    assert bool(moved) == (transfer == "lfs")


def test_what_went_up_by_xet_comes_down_by_plain_http(
    api: HfApi, hub_server: HubServer, some_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_xet()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=some_folder)
    assert next(iter(api.get_paths_info(REPO, "adapter_model.safetensors"))).xet_hash
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    found = snapshot_download(REPO, endpoint=hub_server.url, token=False, cache_dir=tmp_path / "cache")
    assert contents(Path(found)) == contents(some_folder)


def test_a_large_file_goes_up_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    content = os.urandom(1_234_567)
    with HubServer(tmp_path / "hub", part_bytes=500_000) as hub:
        api = HfApi(endpoint=hub.url, token=False)
        api.create_repo(REPO)
        api.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id=REPO)
        parts = [exchange for exchange in hub.faults.log if exchange.method == "PUT"]
        assert sorted(exchange.received for exchange in parts) == [234_567, 500_000, 500_000]
        path = hf_hub_download(REPO, "a.bin", endpoint=hub.url, token=False, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == content
        assert api.get_paths_info(REPO, "a.bin")[0].lfs.sha256 == hashlib.sha256(content).hexdigest()


def test_data_outlives_the_server(
    some_folder: Path, tmp_path: Path, transfer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with HubServer(Path("hub")) as hub:  # relative, as on a command line
        api = HfApi(endpoint=hub.url, token=False)
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=some_folder)
    with HubServer(tmp_path / "hub") as hub:
        found = snapshot_download(REPO, endpoint=hub.url, token=False, cache_dir=tmp_path / "cache")
        assert contents(Path(found)) == contents(some_folder)


def test_commits_apply_adds_and_deletes_and_guard_their_parent(api: HfApi) -> None:
    api.create_repo(REPO)
    first = api.create_commit(
        REPO, [CommitOperationAdd("a/x.txt", b"1"), CommitOperationAdd("b.txt", b"2")], commit_message="one"
    )
    api.create_commit(
        REPO,
        [CommitOperationDelete("a/"), CommitOperationAdd("b.txt", b"3")],
        commit_message="two",
        parent_commit=first.oid,
    )
    assert api.list_repo_files(REPO) == [".gitattributes", "b.txt"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [CommitOperationAdd("c", b"")], commit_message="three", parent_commit=first.oid)
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("nothing")], commit_message="four")
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["two", "one", "initial commit"]


def test_branches_tags_and_trees(api: HfApi) -> None:
    api.create_repo(REPO)
    api.create_branch(REPO, branch="feature/x")
    added = api.create_commit(REPO, [CommitOperationAdd("a/b/c.txt", b"1")], commit_message="m", revision="feature/x")
    assert [entry.path for entry in api.list_repo_tree(REPO, revision="feature/x")] == ["a", ".gitattributes"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "a", revision="feature/x")] == ["a/b"]
    assert not api.file_exists(REPO, "a/b/c.txt")
    api.create_tag(REPO, tag="v1", revision="feature/x")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1", revision="main")
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": added.oid}
    assert {ref.name for ref in refs.branches} == {"main", "feature/x"}
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="feature/x")
    assert not api.revision_exists(REPO, "v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="feature/x")


def test_repositories_are_listed_by_their_cards_and_deleted(api: HfApi, some_folder: Path) -> None:
    api.create_repo(REPO)
    api.create_repo("other/empty")
    api.upload_file(path_or_fileobj=some_folder / "README.md", path_in_repo="README.md", repo_id=REPO)
    assert [model.id for model in api.list_models(filter="base_model:adapter:org/base")] == [REPO]
    assert [model.id for model in api.list_models(author="other")] == ["other/empty"]
    assert api.model_info(REPO).card_data.to_dict()["tags"] == ["sql"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)


@pytest.mark.parametrize("card", ["---\nbase_model: /tmp/base\n---\n", "---\n[1, 2]\n---\n", "---\na: b: c\n---\n"])
def test_a_card_that_the_real_hub_refuses_is_refused(api: HfApi, card: str) -> None:
    api.create_repo(REPO)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=REPO)


# Small enough to be survived where it goes off: eight to the fifth texts.
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n" for before, name in pairwise("abcde")
)


@pytest.mark.parametrize(
    "block",
    [BOMB, "a: " + "[" * 5000, "tags: 5\nbase_model: 7", "base_model: [1, {a: b}]\n2020-01-01: x", "- a", "\x01"],
)
def test_a_strange_card_hurts_no_other_repository(hub_server: HubServer, api: HfApi, block: str) -> None:
    """Committed past the client, which would have had it validated."""
    import httpx

    for repo in (REPO, "org/other"):
        api.create_repo(repo)
    content = base64.b64encode(f"---\n{block}\n---\n".encode()).decode()
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "file", "value": {"content": content, "encoding": "base64", "path": "README.md"}},
    ]
    body = "\n".join(map(json.dumps, lines))
    assert httpx.post(f"{hub_server.url}/api/models/{REPO}/commit/main", content=body).status_code == 200
    assert [model.id for model in api.list_models()] == [REPO, "org/other"]
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md"]
    assert len(httpx.get(f"{hub_server.url}/api/models/{REPO}").content) < 2000


@pytest.mark.parametrize("path", ["../../escape.txt", "a/../../escape.txt"])
def test_no_path_leaves_its_repository(hub_server: HubServer, api: HfApi, path: str) -> None:
    import httpx

    api.create_repo(REPO)
    line = (
        json.dumps({"key": "header", "value": {"summary": "s"}})
        + "\n"
        + json.dumps({"key": "file", "value": {"content": "", "path": path}})
    )
    assert httpx.post(f"{hub_server.url}/api/models/{REPO}/commit/main", content=line).status_code == 400
    assert httpx.get(f"{hub_server.url}/{REPO}/resolve/main/%2E%2E%2Fescape.txt").status_code == 404


@pytest.mark.parametrize("oid", ["xx/etc/hostname", "xx/../../../../etc/hostname", "0" * 63, "A" * 64, ""])
def test_no_file_of_the_machine_is_taken_for_an_upload(hub_server: HubServer, api: HfApi, oid: str) -> None:
    """A commit names what was uploaded by its sha256; a path in its place must not become that file's contents."""
    import httpx

    api.create_repo(REPO)
    value = {"path": "a.safetensors", "algo": "sha256", "size": 1, "oid": oid}
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": value}]
    content = "\n".join(map(json.dumps, lines))
    assert httpx.post(f"{hub_server.url}/api/models/{REPO}/commit/main", content=content).status_code == 400
    assert api.list_repo_files(REPO) == [".gitattributes"]


def test_an_upload_with_other_bytes_than_announced_is_refused(hub_server: HubServer, api: HfApi) -> None:
    import httpx

    api.create_repo(REPO)
    asked = {"objects": [{"oid": hashlib.sha256(b"good").hexdigest(), "size": 4}]}
    batch = httpx.post(f"{hub_server.url}/{REPO}.git/info/lfs/objects/batch", json=asked).json()
    actions = batch["objects"][0]["actions"]
    assert httpx.put(actions["upload"]["href"], content=b"evil").status_code == 400
    assert httpx.post(actions["verify"]["href"], json={}).status_code == 400
    assert httpx.put(f"{hub_server.url}/lfs/guessed", content=b"good").status_code == 403
    assert httpx.put(actions["upload"]["href"], content=b"good").status_code == 200


def test_ranges_are_served(hub_server: HubServer, api: HfApi) -> None:
    import httpx

    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="a.txt", repo_id=REPO)
    got = httpx.get(f"{hub_server.url}/{REPO}/resolve/main/a.txt", headers={"Range": "bytes=3-5"})
    assert (got.status_code, got.content, got.headers["content-range"]) == (206, b"345", "bytes 3-5/10")
