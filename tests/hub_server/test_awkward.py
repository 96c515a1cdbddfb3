"""Awkward arguments, odd names and hostile contents: right, or refused in a sentence, and never at the cost of others."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from adapterhub_lite.hub_server import HubServer

KINDS = pytest.mark.parametrize("kind", ["model", "dataset"])


def write(server: HubServer, path: str, content: bytes, repo: str = "org/model") -> httpx.Response:
    """A commit past the client, which would have looked at it."""
    value = {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "file", "value": value}]
    return httpx.post(f"{server.url}/api/models/{repo}/commit/main", content="\n".join(map(json.dumps, lines)))


@KINDS
def test_the_first_digits_of_a_commit_name_it(api: HfApi, kind: str) -> None:
    api.create_repo("org/repo", repo_type=kind)
    first = api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="org/repo", repo_type=kind).oid
    second = api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="org/repo", repo_type=kind).oid
    assert api.repo_info("org/repo", repo_type=kind, revision=first[:7]).sha == first
    api.create_tag("org/repo", tag="short", revision=first[:8], repo_type=kind)
    api.create_branch("org/repo", branch="long", revision=first, repo_type=kind)
    refs = api.list_repo_refs("org/repo", repo_type=kind)
    assert refs.tags[0].target_commit == first
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "long": first}
    for nothing in (first[:6], "0" * 40, "0" * 7):
        with pytest.raises(RevisionNotFoundError):
            api.repo_info("org/repo", repo_type=kind, revision=nothing)


def test_a_log_is_formatted_when_asked(api: HfApi) -> None:
    api.create_repo("org/model")
    added = [CommitOperationAdd("a", b"1")]
    api.create_commit("org/model", added, commit_message="a <b> & c", commit_description="<i>")
    plain, formatted = (api.list_repo_commits("org/model", formatted=value)[0] for value in (False, True))
    assert (plain.title, plain.formatted_title) == ("a <b> & c", None)
    assert (formatted.formatted_title, formatted.formatted_message) == ("a &lt;b&gt; &amp; c", "&lt;i&gt;")


REFS = ["a b", "a..b", "-x", "a~b", "a//b", "a/.b", "a.lock/b", "a.lock", "a/", "a.", "HEAD", "ü", "x" * 101, "0" * 40,
        "refs/pr/1", "refs/heads/x", "a\n"]  # fmt: skip


@pytest.mark.parametrize("name", REFS)
def test_a_reference_that_git_would_not_have_is_refused(api: HfApi, name: str) -> None:
    api.create_repo("org/model")
    with pytest.raises(HfHubHTTPError, match="not a valid name for a reference"):
        api.create_branch("org/model", branch=name)
    with pytest.raises(HfHubHTTPError, match="not a valid name for a reference"):
        api.create_tag("org/model", tag=name)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag("org/model", tag=name, revision="nothing")
    refs = api.list_repo_refs("org/model")
    assert [ref.name for ref in refs.branches] == ["main"] and not refs.tags


NAMES = [
    "a..b",
    "a--b",
    ".x",
    "x.",
    "x-",
    "-x",
    "x.git",
    "X.GIT",
    "é",
    "x y",
    "x/y",
    "x" * 97,
    "..",
    "a\n",
    "a\0",
    "\ud800",
]


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_a_repository_has_a_name_that_the_client_could_ask_for(
    api: HfApi, hub_server: HubServer, kind: str, name: str
) -> None:
    for owner, repo in (("org", name), (name, "repo")):
        body = json.dumps({"name": repo, "organization": owner, "type": kind})
        answer = httpx.post(
            f"{hub_server.url}/api/repos/create", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]
    assert list(api.list_models()) == list(api.list_datasets()) == []


@pytest.mark.parametrize("owner", ["api", "datasets", "models", "Spaces", "lfs"])
def test_no_owner_has_the_address_of_something_else(api: HfApi, owner: str) -> None:
    with pytest.raises(HfHubHTTPError, match="not a valid name"):
        api.create_repo(f"{owner}/repo")


@pytest.mark.parametrize("name", ["squad", "org/a--b", "datasets/squad", "api/models"])
@KINDS
def test_what_no_repository_is_called_is_not_there(hub_server: HubServer, kind: str, name: str, tmp_path: Path) -> None:
    """`datasets` asks for `squad` at `/datasets/squad/resolve/...`, which is not the repository of an owner `datasets`."""
    prefix = "" if kind == "model" else "datasets/"
    for address in (f"/{prefix}{name}/resolve/main/a.txt", f"/api/{kind}s/{name}", f"/api/{kind}s/{name}/tree/main"):
        answer = httpx.get(hub_server.url + address)
        assert answer.status_code in (401, 404) and answer.headers["x-error-code"] == "RepoNotFound", address


@KINDS
def test_what_would_be_ignored_is_refused(api: HfApi, kind: str) -> None:
    api.create_repo("org/repo", repo_type=kind)
    for where in ({"resource_group_id": "group"}, {"region": "eu"}):
        with pytest.raises(HfHubHTTPError, match="no resource groups and no regions"):
            api.create_repo("org/other", repo_type=kind, **where)
    with pytest.raises(HfHubHTTPError, match="no resource groups"):
        api.duplicate_repo("org/repo", "org/other", repo_type=kind, resource_group_id="group")
    assert not api.repo_exists("org/other", repo_type=kind)
    unknown = httpx.put(f"{api.endpoint}/api/{kind}s/org/repo/settings", json={"discussionsDisabled": True})
    assert unknown.status_code == 400
    with pytest.raises(HfHubHTTPError, match="scans no files"):
        api.model_info("org/repo", securityStatus=True)


@KINDS
def test_a_commit_to_what_is_no_branch_is_refused_before_its_upload(
    api: HfApi, hub_server: HubServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    api.create_repo("org/repo", repo_type=kind)
    api.create_tag("org/repo", tag="v1", repo_type=kind)
    for revision in ("v1", api.repo_info("org/repo", repo_type=kind).sha, "none"):
        with pytest.raises(RevisionNotFoundError):
            api.upload_file(
                path_or_fileobj=b"x", path_in_repo="a.bin", repo_id="org/repo", repo_type=kind, revision=revision
            )
    assert not [exchange for exchange in hub_server.faults.log if "/lfs" in exchange.path]


@KINDS
def test_a_copy_may_be_there_already(api: HfApi, kind: str) -> None:
    api.create_repo("org/one", repo_type=kind)
    for _ in range(2):
        assert api.duplicate_repo("org/one", "org/two", repo_type=kind, exist_ok=True).repo_id == "org/two"
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.duplicate_repo("org/one", "org/two", repo_type=kind)
    with pytest.raises(HfHubHTTPError, match=f"A {kind} repository called org/two already exists"):
        api.move_repo("org/one", "org/two", repo_type=kind)


@KINDS
def test_a_repository_is_moved_and_deleted_by_a_name_that_it_had(api: HfApi, kind: str) -> None:
    api.create_repo("org/first", repo_type=kind)
    api.move_repo("org/first", "org/second", repo_type=kind)
    api.move_repo("org/first", "org/third", repo_type=kind)
    assert api.repo_info("org/second", repo_type=kind).id == "org/third"
    api.delete_repo("org/first", repo_type=kind)
    for name in ("org/first", "org/second", "org/third"):
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info(name, repo_type=kind)


def test_a_folder_is_deleted_with_or_without_its_slash(api: HfApi) -> None:
    api.create_repo("org/model")
    files = [CommitOperationAdd(name, b"1") for name in ("a/1", "a/b/2", "ab/3", "c/4", "c.txt")]
    api.create_commit("org/model", files, commit_message="m")
    api.create_commit("org/model", [CommitOperationDelete("a")], commit_message="m")
    assert api.list_repo_files("org/model") == [".gitattributes", "ab/3", "c.txt", "c/4"]
    api.delete_folder("c", "org/model")
    api.delete_files("org/model", ["*.txt"])
    assert api.list_repo_files("org/model") == [".gitattributes", "ab/3"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("a", "org/model")


def test_the_sha1_of_folders_and_pointers_are_gits(api: HfApi, tmp_path: Path) -> None:
    """A folder comes after `b.txt` and before `b0`, because git orders it as `b/`."""
    api.create_repo("org/model")
    names = ("b.txt", "b/c/d.txt", "b/e", "b0", "ü/ö")
    api.create_commit("org/model", [CommitOperationAdd(name, name.encode()) for name in names], commit_message="m")
    api.delete_file(".gitattributes", "org/model")
    for name in names:
        (tmp_path / "git" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "git" / name).write_bytes(name.encode())

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=tmp_path / "git", check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("-c", "core.autocrlf=false", "add", ".")
    whole = git("write-tree").strip()
    listed = git("-c", "core.quotePath=false", "ls-tree", "-r", "-t", whole).splitlines()
    expected = {line.partition("\t")[2]: line.split()[2] for line in listed}
    found = {
        item.path: getattr(item, "tree_id", None) or item.blob_id
        for item in api.list_repo_tree("org/model", recursive=True)
    }
    assert found == expected
    api.upload_file(path_or_fileobj=b"x" * 7, path_in_repo="a.bin", repo_id="org/model")
    (large,) = api.get_paths_info("org/model", "a.bin")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{large.lfs.sha256}\nsize 7\n"
    assert large.lfs.pointer_size == len(pointer)


def test_sizes_and_configurations_are_what_they_are(api: HfApi) -> None:
    for name, kind in (("org/model", "model"), ("org/small", "dataset"), ("org/large", "dataset")):
        api.create_repo(name, repo_type=kind)
        api.delete_file(".gitattributes", name, repo_type=kind)
    config = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "secret": 1}'
    api.upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id="org/model")
    assert api.model_info("org/model").config == {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    adapter = b'{"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM", "r": NaN}'
    api.upload_file(path_or_fileobj=adapter, path_in_repo="adapter_config.json", repo_id="org/model")
    api.upload_file(path_or_fileobj=b"[" * 9999, path_in_repo="config.json", repo_id="org/model")
    peft = {"peft": {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}}
    assert [model.config for model in api.list_models(fetch_config=True)] == [peft]
    assert [model.config for model in api.list_models()] == [None]
    for size, name in ((10, "org/small"), (2000, "org/large"), (1000, "org/large")):
        api.upload_file(path_or_fileobj=b"x" * size, path_in_repo="a.txt", repo_id=name, repo_type="dataset")
    assert [one.id for one in api.list_datasets(sort="main_size")] == ["org/large", "org/small"]
    large = api.dataset_info("org/large", expand=["mainSize", "usedStorage", "trendingScore", "downloadsAllTime"])
    assert (large.main_size, large.trending_score, large.downloads_all_time) == (1000, 0, 0)
    assert large.used_storage == 3000 + len(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.parquet filter=lfs"
        b" diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n")  # fmt: skip
    with pytest.raises(HfHubHTTPError, match="cannot expand citation"):
        api.dataset_info("org/large", expand=["citation"])


CARDS = ["x: .nan", "x: -.inf", 'tags: ["\\ud800"]', 'x: "\\uD800"', '"\\ud800": 1', "x: !!bool x", "x: !!int ''",
         "x: !!timestamp x", "x: 2001-99-99", "x: " + "1" * 5000, "x: 0x" + "f" * 6000, "? [1, 2]\n: 3", "x: !!set {a, b}",
         "x: !!binary aGk=", "license: [[a]]", "library_name: {a: b}", "language: {}", "a: !!python/object:os.system x",
         "x: !!merge 1", "<<: 5"]  # fmt: skip


@pytest.mark.parametrize("block", CARDS)
def test_no_card_takes_the_listing_from_everybody(api: HfApi, hub_server: HubServer, block: str) -> None:
    for name in ("org/model", "org/other"):
        api.create_repo(name)
    assert write(hub_server, "README.md", f"---\n{block}\n---\n# Hello\n".encode()).status_code == 200
    for query in ({}, {"full": True}, {"cardData": True}, {"expand": ["cardData"]}):
        assert [model.id for model in api.list_models(**query)] == ["org/model", "org/other"]  # type: ignore[arg-type]
    assert api.model_info("org/model").id == "org/model"
    for page in ("/", "/org/model"):
        assert httpx.get(hub_server.url + page).status_code == 200
    assert httpx.post(f"{hub_server.url}/api/validate-yaml", json={"content": f"---\n{block}\n---\n"}).status_code < 500


def test_a_card_is_validated_where_the_client_asks(api: HfApi) -> None:
    api.create_repo("org/model")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Nothing", path_in_repo="README.md", repo_id="org/model")
    with pytest.raises(ValueError, match="Invalid metadata"):
        card = b"\n---\nmodel-index: name\n---\n"
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/model")


ESCAPES = [
    "%0D%0AX-Evil:1",
    "a%0Ab",
    "%00",
    "%C3%BC",
    "%ED%A0%80",
    "..%2F..%2Fhub.lock",
    "%2E%2E",
    "%5C..",
    "a%7Fb",
    "%20",
]
ADDRESSES = ["/api/models/org/model/revision/{}", "/api/models/org/model/tree/main/{}", "/api/models/org/model/tree/{}",
             "/api/models/org/model/commits/{}", "/api/models/{}/model", "/api/models/org/{}", "/api/{}/org/model",
             "/org/model/resolve/{}/a", "/org/model/resolve/main/{}", "/datasets/org/{}/resolve/main/a", "/{}/model",
             "/org/model/tree/{}", "/org/model/{}/main", "/lfs/{}", "/{}", "/api/models/org/model/xet-read-token/{}",
             "/api/models/org/model/xet-{}-token/main", "/api/models?cursor={}", "/api/models?sort={}",
             "/api/models?search=none&author={}&filter={}&pipeline_tag={}&expand={}", "/api/models/org/model?expand={}",
             "/?search={}"]  # fmt: skip


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_parameter_leaves_its_place(api: HfApi, hub_server: HubServer, escape: str) -> None:
    """Neither out of a folder nor into a header, and the connection stands."""
    api.create_repo("org/model")
    with httpx.Client() as connection:
        for address in ADDRESSES:
            for method in ("GET", "HEAD", "POST", "DELETE", "PUT"):
                answer = connection.request(method, hub_server.url + address.replace("{}", escape))
                assert answer.status_code in (200, 400, 401, 403, 404, 422, 501), (method, address)
                assert "x-evil" not in answer.headers and "fcntl" not in answer.text
        for ref in ("branch/{}", "tag/{}", "super-squash/{}", "commit/{}", "preupload/{}"):
            body = json.dumps({"tag": "ok", "files": []})
            address = f"{hub_server.url}/api/models/org/model/{ref.replace('{}', escape)}"
            answer = connection.post(address, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 404) and "x-evil" not in answer.headers, ref
    assert api.list_repo_files("org/model") == [".gitattributes"]


def test_text_that_no_answer_can_carry_is_refused(api: HfApi, hub_server: HubServer) -> None:
    api.create_repo("org/model")
    address = f"{hub_server.url}/api/models/org/model"
    half = '"\\ud800"'
    header = '{"key": "header", "value": {"summary": "s"}}'
    bodies = [
        ("commit/main", f'{{"key": "header", "value": {{"summary": {half}}}}}'),
        ("commit/main", f'{header}\n{{"key": "file", "value": {{"path": {half}, "content": ""}}}}'),
        (
            "commit/main",
            f'{header}\n{{"key": "file", "value": {{"path": "a", "content": {half}, "encoding": "utf-8"}}}}',
        ),
        ("commit/main", f'{header}\n{{"key": "deletedFile", "value": {{"path": {half}}}}}'),
        ("tag/main", f'{{"tag": {half}}}'),
        ("branch/new", f'{{"startingPoint": {half}}}'),
        ("preupload/main", f'{{"files": [{{"path": {half}}}]}}'),
        ("duplicate", f'{{"repository": {half}}}'),
        ("super-squash/main", f'{{"message": {half}}}'),
        ("lfs-files/duplicate", f'{{"target": {{"type": {half}, "name": "org/model"}}, "files": []}}'),
    ]
    for path, body in bodies:
        answer = httpx.post(f"{address}/{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"], (path, answer.text)
    assert [entry.title for entry in api.list_repo_commits("org/model")] == ["initial commit"]


def test_no_request_carries_more_than_it_may(api: HfApi, hub_server: HubServer) -> None:
    api.create_repo("org/model")

    def endless() -> Iterator[bytes]:
        yield b'{"content": "'
        for _ in range(20):
            yield b"x" * (1 << 20)

    for path in ("/api/validate-yaml", "/api/repos/create", "/api/models/org/model/paths-info/main",
                 "/api/models/org/model/preupload/main", "/api/models/org/model/tag/main",
                 "/org/model.git/info/lfs/objects/batch", "/api/models/org/model/lfs-files/duplicate"):  # fmt: skip
        answer = httpx.post(hub_server.url + path, content=endless(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, path
    parts = {"objects": [{"oid": "0" * 64, "size": 10**18}]}
    announced = httpx.post(f"{hub_server.url}/org/model.git/info/lfs/objects/batch", json=parts)
    assert announced.status_code == 413 and "parts" in announced.json()["error"]


def test_a_refusal_has_a_number(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError) as refused:
        api.model_info("org/none")
    assert refused.value.request_id and refused.value.request_id in str(refused.value)
