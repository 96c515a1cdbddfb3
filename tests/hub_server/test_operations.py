"""Each operation of the client on model and data set repositories: right, or refused before anything is written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapterhub_lite.errors import ResourceError
from adapterhub_lite.hub_server import Account, HubServer
from adapterhub_lite.hub_server.gc import collect

KINDS = pytest.mark.parametrize("kind", ["model", "dataset"])
CARD = (
    b"---\nlicense: mit\nlanguage: [en]\npipeline_tag: text-generation\nlibrary_name: peft\ntags: [sql]\n---\n# Hello\n"
)


def commit_url(server: HubServer, repo: str = "org/model") -> str:
    return f"{server.url}/api/models/{repo}/commit/main"


def lines(*operations: dict[str, object], **header: object) -> str:
    return "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "s"} | header}, *operations]))


def added(path: str, content: str = "") -> dict[str, object]:
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


@KINDS
def test_the_life_of_a_repository(api: HfApi, kind: str, tmp_path: Path, hub_server: HubServer) -> None:
    url = api.create_repo("org/one", repo_type=kind)
    assert (url.repo_id, url.repo_type) == ("org/one", kind)
    commit = api.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id="org/one", repo_type=kind)
    assert commit.commit_url.startswith(hub_server.url) and commit.commit_url.endswith(commit.oid)
    assert commit.repo_url.repo_id == "org/one"
    api.upload_file(path_or_fileobj=b"x" * 99, path_in_repo="a/b.bin", repo_id="org/one", repo_type=kind)
    info = api.repo_info("org/one", repo_type=kind, files_metadata=True)
    assert info.author == "org" and "license:mit" in info.tags
    assert {file.rfilename: file.size for file in info.siblings}["a/b.bin"] == 99
    assert api.file_exists("org/one", "a/b.bin", repo_type=kind) and not api.file_exists("org/one", "x", repo_type=kind)
    assert Path(hf_hub_download("org/one", "a/b.bin", repo_type=kind, endpoint=hub_server.url, token=False,
                                cache_dir=tmp_path)).read_bytes() == b"x" * 99  # fmt: skip
    listed = api.list_models if kind == "model" else api.list_datasets
    assert [repo.id for repo in listed()] == ["org/one"]
    other = api.list_datasets if kind == "model" else api.list_models
    assert list(other()) == []
    api.delete_file("a/b.bin", "org/one", repo_type=kind)
    api.super_squash_history("org/one", repo_type=kind, commit_message="one")
    assert [entry.title for entry in api.list_repo_commits("org/one", repo_type=kind)] == ["one"]
    assert api.duplicate_repo("org/one", "org/two", repo_type=kind).repo_id == "org/two"
    assert api.list_repo_files("org/two", repo_type=kind) == api.list_repo_files("org/one", repo_type=kind)
    api.delete_repo("org/one", repo_type=kind)
    assert not api.repo_exists("org/one", repo_type=kind)


@KINDS
def test_a_pull_request_is_refused_before_anything_is_written(api: HfApi, hub_server: HubServer, kind: str) -> None:
    api.create_repo("org/model", repo_type=kind)
    for name in ("a.txt", "large.bin"):
        with pytest.raises(HfHubHTTPError, match="has no pull requests"):
            api.upload_file(
                path_or_fileobj=b"x", path_in_repo=name, repo_id="org/model", repo_type=kind, create_pr=True
            )
    body = lines(added("a.txt"))
    assert (
        httpx.post(f"{hub_server.url}/api/{kind}s/org/model/commit/main?create_pr=1", content=body).status_code == 501
    )
    with pytest.raises(HfHubHTTPError, match="does not support"):
        api.create_pull_request("org/model", title="a change", repo_type=kind)
    assert [entry.title for entry in api.list_repo_commits("org/model", repo_type=kind)] == ["initial commit"]
    assert not any(exchange.method == "PUT" for exchange in hub_server.faults.log)
    assert list(api.get_repo_discussions("org/model", repo_type=kind)) == []


UNSUPPORTED: dict[str, Callable[[HfApi], object]] = {
    "spaces": lambda api: api.create_repo("org/space", repo_type="space", space_sdk="gradio"),
    "list_spaces": lambda api: list(api.list_spaces()),
    "likers": lambda api: list(api.list_repo_likers("org/model")),
    "delete_lfs": lambda api: api.permanently_delete_lfs_files("org/model", api.list_lfs_files("org/model")),
    "access_requests": lambda api: list(api.list_pending_access_requests("org/model")),
    "collections": lambda api: api.create_collection(title="some", namespace="org"),
    "discussion": lambda api: api.get_discussion_details("org/model", 1),
    "comment": lambda api: api.comment_discussion("org/model", 1, "hello"),
    "tags": lambda api: api.get_model_tags(),
    "user": lambda api: api.get_user_overview("ann"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_this_hub_does_not_have_is_said(api: HfApi, name: str) -> None:
    api.create_repo("org/model")
    with pytest.raises(HfHubHTTPError, match=r"does not support|holds models and data sets") as refused:
        UNSUPPORTED[name](api)
    assert refused.value.response.status_code == 501


def test_main_stays_and_a_broken_repository_hides_no_other(api: HfApi, tmp_path: Path) -> None:
    for name in ("org/one", "org/two"):
        api.create_repo(name)
    with pytest.raises(HfHubHTTPError, match="cannot be deleted"):
        api.delete_branch("org/one", branch="main")
    stored = tmp_path / "hub-data" / "repos" / "org" / "one" / "repo.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"branches": {}}))
    assert [model.id for model in api.list_models()] == ["org/two"]


PATHS = [
    "../x", "a/../x", "/x", "a//b", "./a", "a/./b", "..\\x", "a\\b", "C:x", ".git/config", "a/.git/x", "a\0b", "a\nb", "",
    "x" * 300, "x/" * 600 + "x",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_some_disk_would_misread_is_refused(api: HfApi, hub_server: HubServer, path: str) -> None:
    api.create_repo("org/model")
    for operation in (added(path), {"key": "deletedFile", "value": {"path": path}}):
        assert httpx.post(commit_url(hub_server), content=lines(operation)).status_code in (400, 404)
    planned = {"files": [{"path": path, "size": 1, "sample": ""}]}
    assert httpx.post(f"{hub_server.url}/api/models/org/model/preupload/main", json=planned).status_code == 400
    assert api.list_repo_files("org/model") == [".gitattributes"]


def test_a_name_is_a_file_or_a_folder(api: HfApi) -> None:
    api.create_repo("org/model")
    api.create_commit("org/model", [CommitOperationAdd("a", b"1"), CommitOperationAdd("c/d", b"1")], commit_message="m")
    for path in ("a/b", "c"):
        with pytest.raises(HfHubHTTPError, match="at once"):
            api.create_commit("org/model", [CommitOperationAdd(path, b"2")], commit_message="m")
    change = [CommitOperationDelete("a"), CommitOperationAdd("a/b", b"2")]
    api.create_commit("org/model", change, commit_message="a file becomes a folder")
    assert "a/b" in api.list_repo_files("org/model")


BAD_COMMITS = [
    "", "not json", "[]", "{}", '{"key": "header"}', '{"key": "header", "value": {}}', lines({"key": "file"}),
    lines({"key": "file", "value": {"path": "a"}}), lines({"key": "nothing", "value": {"path": "a"}}),
    lines(added("a.txt", "!!")), lines(added("a.txt", "aGk")), lines({"key": "file", "value": {"path": 1, "content": ""}}),
    lines({"key": "lfsFile", "value": {"path": "a.bin", "oid": "zz"}}), lines(added("a.txt"), parentCommit="zz"),
    added("a.txt") and json.dumps(added("a.txt")), "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_COMMITS)
def test_a_malformed_commit_is_refused(api: HfApi, hub_server: HubServer, body: str) -> None:
    api.create_repo("org/model")
    answer = httpx.post(commit_url(hub_server), content=body)
    assert answer.status_code == 400 and answer.json()["error"] and answer.headers["x-error-message"]
    assert len(api.list_repo_commits("org/model")) == 1


@pytest.mark.parametrize(
    "body", ["", "x", "[]", "null", "{}", '{"name": 5}', '{"files": 3}', '{"objects": [{"oid": 1}]}']
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete"), ("POST", "/api/repos/move"),
     ("POST", "/api/models/org/model/preupload/main"), ("POST", "/api/models/org/model/tag/main"),
     ("POST", "/org/model.git/info/lfs/objects/batch"), ("POST", "/api/models/org/model/lfs-files/duplicate")],
)  # fmt: skip
def test_a_malformed_body_is_a_400(api: HfApi, hub_server: HubServer, method: str, path: str, body: str) -> None:
    api.create_repo("org/model")
    answer = httpx.request(method, hub_server.url + path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]


def test_addresses_of_nothing_are_said_in_the_clients_words(api: HfApi) -> None:
    api.create_repo("org/model")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/model", "no/such/folder"))
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/model", ".gitattributes"))
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_files("org/model", revision="refs/pr/1")
    for missing in ("org/none", "gpt2"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(missing)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(missing, "config.json", endpoint=api.endpoint, token=False)
        with pytest.raises(RepositoryNotFoundError):
            api.auth_check(missing)
        with pytest.raises(RepositoryNotFoundError):
            api.list_repo_files(missing)
    api.auth_check("org/model")
    api.auth_check("org/model", write=True)


def test_an_ignored_file_stays_out(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("org/model")
    api.upload_file(path_or_fileobj=b"*.log\n/build/\n", path_in_repo=".gitignore", repo_id="org/model")
    folder = tmp_path / "work"
    (folder / "build").mkdir(parents=True)
    for name in ("a.log", "a.txt", "build/b.txt"):
        (folder / name).write_text("x")
    api.upload_folder(repo_id="org/model", folder_path=folder)
    assert api.list_repo_files("org/model") == [".gitattributes", ".gitignore", "a.txt"]


def test_capitals_make_no_second_repository(api: HfApi) -> None:
    api.create_repo("org/CaseRepo")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/caserepo")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="org/caserepo")
    assert api.model_info("org/caserepo").id == "org/CaseRepo" and len(list(api.list_models())) == 1


def test_listings_are_searched_filtered_and_ordered(api: HfApi) -> None:
    for name in ("org/First", "org/second", "team/third"):
        api.create_repo(name)
    api.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id="org/First")
    api.update_repo_settings("org/second", gated="auto")
    assert [model.id for model in api.list_models(search="FIRST")] == ["org/First"]
    assert [model.id for model in api.list_models(filter="license:mit")] == ["org/First"]
    assert [model.id for model in api.list_models(filter=["sql", "en"])] == ["org/First"]
    assert [model.id for model in api.list_models(pipeline_tag="text-generation")] == ["org/First"]
    assert [model.id for model in api.list_models(gated=True)] == ["org/second"]
    assert [model.id for model in api.list_models(author="TEAM")] == ["team/third"]
    assert [model.id for model in api.list_models(sort="last_modified")] == ["org/First", "team/third", "org/second"]
    assert [model.id for model in api.list_models(sort="created_at", limit=2)] == ["team/third", "org/second"]
    (found,) = api.list_models(search="first", full=True)
    assert (found.author, found.pipeline_tag, found.library_name) == ("org", "text-generation", "peft")
    assert [file.rfilename for file in found.siblings] == [".gitattributes", "README.md"]
    (brief,) = api.list_models(search="first", expand=["author"])
    assert brief.author == "org" and brief.tags is None
    for refused in ({"sort": "smell"}, {"num_parameters": "min:1B"}, {"apps": "vllm"}):
        with pytest.raises(HfHubHTTPError, match="This hub cannot"):
            list(api.list_models(**refused))  # type: ignore[arg-type]


def test_long_listings_come_in_pages(api: HfApi, hub_server: HubServer) -> None:
    api.create_repo("org/model")
    files = [CommitOperationAdd(f"many/{number:04}.txt", b"x") for number in range(1100)]
    api.create_commit("org/model", files, commit_message="many")
    assert len(list(api.list_repo_tree("org/model", "many"))) == 1100
    pages = [exchange for exchange in hub_server.faults.log if "/tree/" in exchange.path]
    assert len(pages) == 2
    newest = next(iter(api.list_repo_tree("org/model", "many", expand=True)))
    assert newest.last_commit is not None and newest.last_commit.title == "many"


def test_a_renamed_repository_is_found_under_both_names(api: HfApi, hub_server: HubServer, tmp_path: Path) -> None:
    api.create_repo("org/old", private=False)
    api.upload_file(path_or_fileobj=b"x" * 9, path_in_repo="a.bin", repo_id="org/old")
    api.update_repo_settings("org/old", gated="manual")
    api.create_tag("org/old", tag="v1")
    api.move_repo("org/old", "team/new")
    assert api.model_info("org/old").id == "team/new" and api.model_info("team/new").gated == "manual"
    api.update_repo_settings("team/new", gated=False)
    for name in ("org/old", "team/new"):
        got = hf_hub_download(name, "a.bin", revision="v1", endpoint=hub_server.url, token=False, cache_dir=tmp_path)
        assert Path(got).read_bytes() == b"x" * 9
    api.upload_file(path_or_fileobj=b"y", path_in_repo="b.txt", repo_id="org/old")
    assert api.file_exists("team/new", "b.txt")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.move_repo("team/new", "team/new")
    api.create_repo("org/old")  # the name is free again, and then leads nowhere else
    assert api.model_info("org/old").id == "org/old"


def test_a_private_repository_is_hidden_behind_its_old_name_too(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", tokens={"hf_ann": Account("ann"), "hf_bob": Account("bob")}) as server:
        ann, bob = (HfApi(endpoint=server.url, token=token) for token in ("hf_ann", "hf_bob"))
        ann.create_repo("ann/old", private=True)
        ann.move_repo("ann/old", "ann/new")
        assert ann.model_info("ann/old").private
        for name in ("ann/old", "ann/new"):
            with pytest.raises(RepositoryNotFoundError):
                bob.model_info(name)
        with pytest.raises(HfHubHTTPError, match="403"):
            ann.move_repo("ann/new", "bob/new")
        ann.create_repo("ann/rows", repo_type="dataset")
        ann.update_repo_settings("ann/rows", repo_type="dataset", gated="auto")
        with pytest.raises(GatedRepoError):
            bob.auth_check("ann/rows", repo_type="dataset")
        assert next(iter(bob.list_datasets(gated=True))).id == "ann/rows"


def test_files_are_copied_inside_and_between_repositories(api: HfApi, transfer: str) -> None:
    for name in ("org/one", "org/two"):
        api.create_repo(name)
    api.upload_file(path_or_fileobj=b"x" * 3000, path_in_repo="a.bin", repo_id="org/one")
    api.create_commit("org/one", [CommitOperationCopy("a.bin", "b/c.bin")], commit_message="copy")
    one, other = api.get_paths_info("org/one", ["a.bin", "b/c.bin"])
    assert one.lfs.sha256 == other.lfs.sha256
    if transfer == "xet":
        across = CommitOperationCopy("a.bin", "d.bin", src_repo_id="org/one", src_repo_type="model")
        api.create_commit("org/two", [across], commit_message="copy")
        assert api.file_exists("org/two", "d.bin")


def test_a_repository_stays_below_its_quota(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", quota_bytes=10_000) as server:
        api = HfApi(endpoint=server.url, token=False)
        api.create_repo("org/model")
        for name in ("a.bin", "a.txt"):
            with pytest.raises(HfHubHTTPError, match="10,000"):
                api.upload_file(path_or_fileobj=b"x" * 20_000, path_in_repo=name, repo_id="org/model")
        api.upload_file(path_or_fileobj=b"x" * 6_000, path_in_repo="a.bin", repo_id="org/model")
        api.upload_file(path_or_fileobj=b"x" * 6_000, path_in_repo="same.bin", repo_id="org/model")  # one content
        with pytest.raises(HfHubHTTPError, match="10,000"):
            api.upload_file(path_or_fileobj=b"y" * 6_000, path_in_repo="a.bin", repo_id="org/model")  # history counts
        body = lines(added("b.txt", "eHh4eHh4" * 2_000))
        assert httpx.post(commit_url(server), content=body).status_code == 413
        assert "b.txt" not in api.list_repo_files("org/model")


def test_an_upload_of_more_than_was_announced_is_cut_off(api: HfApi, hub_server: HubServer, tmp_path: Path) -> None:
    api.create_repo("org/model")
    asked = {"objects": [{"oid": "0" * 64, "size": 10}]}
    batch = httpx.post(f"{hub_server.url}/org/model.git/info/lfs/objects/batch", json=asked).json()
    href = batch["objects"][0]["actions"]["upload"]["href"]
    assert httpx.put(href, content=b"x" * 1_000_000).status_code == 413
    assert httpx.put(f"{href}/9999", content=b"x").status_code == 400
    assert not list((tmp_path / "hub-data" / "incoming").iterdir())


def test_contents_that_no_commit_names_are_freed(tmp_path: Path, transfer: str) -> None:
    with HubServer(tmp_path / "hub") as server:
        api = HfApi(endpoint=server.url, token=False)
        for name in ("org/gone", "org/kept"):
            api.create_repo(name)
            api.upload_file(path_or_fileobj=name.encode() * 3000, path_in_repo="a.bin", repo_id=name)
        api.delete_repo("org/gone")
        with pytest.raises(ResourceError, match="Another hub"):
            collect(tmp_path / "hub")
    planned = collect(tmp_path / "hub", dry_run=True)
    freed = collect(tmp_path / "hub")
    assert len(planned.contents) == 1 and freed.contents == planned.contents and freed.freed_bytes >= 24_000
    assert collect(tmp_path / "hub").contents == ()
    with HubServer(tmp_path / "hub") as server:
        got = hf_hub_download("org/kept", "a.bin", endpoint=server.url, token=False, cache_dir=tmp_path / "cache")
        assert Path(got).read_bytes() == b"org/kept" * 3000


def test_a_copy_made_in_the_middle_of_a_commit_opens_at_the_one_before(tmp_path: Path) -> None:
    """Whatever order the files are copied in: here the repositories come last, after one more commit."""
    with HubServer(tmp_path / "hub") as server:
        api = HfApi(endpoint=server.url, token=False)
        api.create_repo("org/model")
        first = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="org/model")
        shutil.copytree(tmp_path / "hub" / "blobs", tmp_path / "copy" / "blobs")
        second = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="org/model")
        api.create_tag("org/model", tag="v2")
        shutil.copytree(tmp_path / "hub" / "repos", tmp_path / "copy" / "repos")
    with HubServer(tmp_path / "copy") as server:
        copied = HfApi(endpoint=server.url, token=False)
        assert copied.model_info("org/model").sha == first.oid
        assert not copied.revision_exists("org/model", "v2")
    with HubServer(tmp_path / "hub") as server:
        assert HfApi(endpoint=server.url, token=False).model_info("org/model").sha == second.oid


DATA_SET = """
import sys, datasets
from adapterhub_lite.training.data.rows import load_rows
rows = [{"prompt": f"{n} plus {n}?", "completion": str(2 * n)} for n in range(30)]
datasets.Dataset.from_list(rows).train_test_split(test_size=10, seed=0).push_to_hub("org/rows", token=False)
back = datasets.load_dataset("org/rows", split="train")
assert len(back) == 20 and set(back.column_names) == {"prompt", "completion"}, back
assert len(datasets.load_dataset("org/rows")["test"]) == 10
streamed = list(datasets.load_dataset("org/rows", split="test", streaming=True))
assert len(streamed) == 10 and set(streamed[0]) == {"prompt", "completion"}
from huggingface_hub import HfApi
api = HfApi(token=False)
assert "dataset_info" in api.dataset_info("org/rows").card_data.to_dict()
api.create_repo("org/lines", repo_type="dataset")
content = b"".join(b'{"text": "row %d"}\\n' % n for n in range(5))
api.upload_file(path_or_fileobj=content, path_in_repo="train.jsonl", repo_id="org/lines", repo_type="dataset")
assert len(datasets.load_dataset("org/lines", split="train")) == 5
other = datasets.Dataset.from_list([{"n": 1}, {"n": 2}])
other.push_to_hub("org/rows", config_name="other", split="validation", token=False)
assert datasets.get_dataset_config_names("org/rows", token=False) == ["default", "other"]
assert datasets.get_dataset_split_names("org/rows", "other", token=False) == ["validation"]
assert datasets.load_dataset_builder("org/rows", "other", token=False).info.splits["validation"].num_examples == 2
api.create_branch("org/rows", branch="dev", repo_type="dataset")
other.select([0]).push_to_hub("org/rows", config_name="other", split="validation", revision="dev", token=False)
for revision, count in (("dev", 1), ("main", 2)):
    assert len(datasets.load_dataset("org/rows", "other", split="validation", revision=revision)) == count
api.upload_file(path_or_fileobj=b"a,b\\n1,2\\n", path_in_repo="x/t.csv", repo_id="org/lines", repo_type="dataset")
assert datasets.load_dataset("org/lines", data_files="x/*.csv", split="train")[:] == {"a": [1], "b": [2]}
streamed = datasets.load_dataset("csv", data_files="hf://datasets/org/lines/x/t.csv", split="train", streaming=True)
assert list(streamed) == [{"a": 1, "b": 2}]
assert len(load_rows("org/lines")) == 5 and len(load_rows("org/rows")) == 20
print("all right")
"""


def test_data_sets_are_pushed_loaded_and_streamed(hub_server: HubServer, tmp_path: Path, home: Path) -> None:
    """In a process of its own: `datasets` reads the endpoint once."""
    import os

    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DATA_SET], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout + done.stderr


def test_the_page_shows_what_anybody_may_see_and_runs_nothing(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", tokens={"hf_ann": Account("ann")}) as server:
        api = HfApi(endpoint=server.url, token="hf_ann")
        card = b"---\nlicense: mit\n---\n# Hi\n<script>alert(1)</script> [x](javascript:alert(1)) ![y](http://evil/x.png)\n"
        for name, private in (("ann/open", False), ("ann/secret", True)):
            api.create_repo(name, private=private)
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=name)
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a <b>.txt", repo_id="ann/open")
        api.create_tag("ann/open", tag="v1")
        front = httpx.get(server.url)
        assert "ann/open" in front.text and "secret" not in front.text
        shown = httpx.get(f"{server.url}/ann/open")
        assert "default-src 'none'" in shown.headers["content-security-policy"]
        assert "<script" not in shown.text and 'href="javascript' not in shown.text and "<img" not in shown.text
        assert "a &lt;b&gt;.txt" in shown.text and f"pull ann/open --endpoint {server.url}" in shown.text
        assert httpx.get(f"{server.url}/ann/open/tree/v1").status_code == 200
        commit = api.model_info("ann/open").sha
        assert httpx.get(f"{server.url}/ann/open/commit/{commit}").status_code == 200
        for hidden in ("/ann/secret", "/ann/none", "/nothing/at/all/here", "/ann/open/tree/none"):
            answer = httpx.get(server.url + hidden, headers={"Accept": "text/html"})
            assert answer.status_code in (401, 404) and "<h1>" in answer.text


def test_a_page_of_another_site_reaches_nothing(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", hosts=("hub.example.org",)) as server:
        new = {"name": "model", "organization": "org"}

        def create(**headers: str) -> int:
            return httpx.post(f"{server.url}/api/repos/create", json=new, headers=headers).status_code

        assert create(Origin="http://evil.example") == 403 and create(Host="evil.example") == 421
        assert create(Origin="null") == 403
        assert list(HfApi(endpoint=server.url, token=False).list_models()) == []
        assert create(Host="hub.example.org") == 200
        page = httpx.get(server.url)
        assert page.headers["x-frame-options"] == "DENY"
