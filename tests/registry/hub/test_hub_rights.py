"""Each way in which a hub says no is its own sentence, and a token goes only where it was meant to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import HubPermissionError, HubUnreachableError, PublishConflictError, UsageError
from adapterhub_lite.hub_server import Account, HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import HubRepo

TOKENS = {
    "hf_ann": Account("ann", orgs=("team",)),
    "hf_ann_reads": Account("ann", role="read", orgs=("team",)),
    "hf_bob": Account("bob"),
}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", tokens=TOKENS) as server:
        yield server


@pytest.fixture
def one(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> AdapterRegistry:
    registry.add(adapter, "sql", base=base)
    return registry


@pytest.mark.parametrize(
    ("repo_id", "token", "text"),
    [
        ("team/sql", None, "token is needed"),
        ("team/sql", "hf_wrong", "token was not accepted"),
        ("team/sql", "hf_ann_reads", "read-only"),
        ("team/sql", "hf_bob", "does not belong to the organisation 'team' .is in no organisation"),
        ("bob/sql", "hf_ann", "does not belong to the organisation 'bob' .is in team"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_who_may_not_push_is_told_why(
    one: AdapterRegistry, guarded: HubServer, repo_id: str, token: str | None, text: str, exists: bool
) -> None:
    if exists:
        HfApi(endpoint=guarded.url, token="hf_bob" if "bob" in repo_id else "hf_ann").create_repo(repo_id)
    with pytest.raises(HubPermissionError, match=text):
        one.push("sql", repo_id, endpoint=guarded.url, token=token)


def test_private_repositories_are_pushed_and_pulled_with_a_token(
    one: AdapterRegistry, guarded: HubServer, tmp_path: Path
) -> None:
    one.push("sql", "team/secret", endpoint=guarded.url, token="hf_ann", private=True)
    assert HfApi(endpoint=guarded.url, token="hf_ann").model_info("team/secret").private
    there = AdapterRegistry(tmp_path / "there")
    with pytest.raises(HubPermissionError, match="private and no token was given"):
        there.pull("team/secret", endpoint=guarded.url)
    with pytest.raises(HubPermissionError, match="'bob' may not see it"):
        there.pull("team/secret", endpoint=guarded.url, token="hf_bob")
    assert there.pull("team/secret", endpoint=guarded.url, token="hf_ann_reads").manifest.published() == one.resolve(
        "sql"
    )


def test_private_is_never_quietly_public(one: AdapterRegistry, guarded: HubServer) -> None:
    HfApi(endpoint=guarded.url, token="hf_ann").create_repo("ann/open")
    with pytest.raises(HubPermissionError, match="is public"):
        one.push("sql", "ann/open", endpoint=guarded.url, token="hf_ann", private=True)
    assert HfApi(endpoint=guarded.url, token="hf_ann").list_repo_files("ann/open") == [".gitattributes"]


def test_a_gated_repository_says_what_to_do(one: AdapterRegistry, guarded: HubServer, tmp_path: Path) -> None:
    one.push("sql", "ann/gated", endpoint=guarded.url, token="hf_ann")
    HfApi(endpoint=guarded.url, token="hf_ann").update_repo_settings("ann/gated", gated="auto")
    for token in (None, "hf_bob"):
        with pytest.raises(HubPermissionError, match="Accept its terms"):
            AdapterRegistry(tmp_path / "there").pull("ann/gated", endpoint=guarded.url, token=token)


def test_a_published_version_never_changes(
    one: AdapterRegistry, other_adapter: Path, base: ResolvedBase, guarded: HubServer, tmp_path: Path
) -> None:
    one.push("sql", "ann/sql", endpoint=guarded.url, token="hf_ann")
    colleague = AdapterRegistry(tmp_path / "colleague")
    colleague.add(other_adapter, "sql", base=base)
    with pytest.raises(PublishConflictError, match="another adapter as v1"):
        colleague.push("sql", "ann/sql", endpoint=guarded.url, token="hf_ann")
    HfApi(endpoint=guarded.url, token="hf_ann").create_repo("ann/tagged")
    HfApi(endpoint=guarded.url, token="hf_ann").create_tag("ann/tagged", tag="v1")
    with pytest.raises(PublishConflictError, match="another adapter as v1"):
        colleague.push("sql", "ann/tagged", endpoint=guarded.url, token="hf_ann")


def test_a_saved_token_is_not_sent_to_another_hub(
    one: AdapterRegistry, guarded: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    with pytest.raises(HubPermissionError, match="token is needed"):
        one.push("sql", "ann/sql", endpoint=guarded.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", guarded.url)
    assert one.push("sql", "ann/sql", endpoint=guarded.url).uploaded


def test_one_file_speaks_to_a_hub() -> None:
    """`hub/client` asks, `hub/errors` knows its exceptions; the rest of the registry says what, not how."""
    import ast

    import adapterhub_lite.registry

    speaking = {"huggingface_hub", "hf_xet", "httpx", "httpx2", "requests", "urllib", "http"}
    found: dict[str, set[str]] = {}
    for path in Path(adapterhub_lite.registry.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if used := {name for name in names if name.partition(".")[0] in speaking}:
                name = f"{path.parent.name}/{path.stem}"
                found[name] = found.get(name, set()) | used
    assert found == {
        "hub/client": {"huggingface_hub", "httpx2"},
        "hub/errors": {"huggingface_hub.errors", "httpx2"},
    }


@pytest.mark.parametrize("repo_id", ["a/b/c", "a b/c", "../x", ""])
def test_what_is_no_repository_is_a_mistake_of_the_caller(
    one: AdapterRegistry, guarded: HubServer, repo_id: str
) -> None:
    with pytest.raises(UsageError, match="owner/name"):
        one.push("sql", repo_id, endpoint=guarded.url, token="hf_ann")


def test_a_hub_that_is_not_there(one: AdapterRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.registry.hub.client.TRIES", 1)
    with pytest.raises(HubUnreachableError, match="ConnectError"):
        one.push("sql", "ann/sql", endpoint="http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE"):
        HubRepo("ann/sql", endpoint="http://127.0.0.1:1").head()


def test_a_number_is_taken_from_the_commit_on_not_from_the_tag_on(
    one: AdapterRegistry, other_adapter: Path, base: ResolvedBase, guarded: HubServer, tmp_path: Path
) -> None:
    """The first publisher died before its tag; the second must not slip in under the same number."""
    guarded.faults.add("503", "/tag/", times=99)
    with pytest.raises(HubUnreachableError):
        one.push("sql", "ann/sql", endpoint=guarded.url, token="hf_ann")
    guarded.faults.clear()
    colleague = AdapterRegistry(tmp_path / "colleague")
    colleague.add(other_adapter, "sql", base=base)
    with pytest.raises(PublishConflictError, match="another adapter as v1"):
        colleague.push("sql", "ann/sql", endpoint=guarded.url, token="hf_ann")
    assert one.push("sql", "ann/sql", endpoint=guarded.url, token="hf_ann").tag == "v1"


def test_a_tag_that_somebody_else_sets_meanwhile_is_not_taken_for_ours(
    one: AdapterRegistry, guarded: HubServer
) -> None:
    api = HfApi(endpoint=guarded.url, token="hf_ann")

    def meddle(step: str) -> None:
        if step == "tagging v1":
            api.create_tag("ann/sql", tag="v1", revision=api.list_repo_commits("ann/sql")[-1].commit_id)

    with pytest.raises(PublishConflictError, match="another adapter as v1"):
        one.push("sql", "ann/sql", endpoint=guarded.url, token="hf_ann", progress=meddle)
