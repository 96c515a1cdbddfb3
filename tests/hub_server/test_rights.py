"""Who may do what on a hub with tokens, in the exceptions that the client knows."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from adapterhub_lite.errors import ResourceError
from adapterhub_lite.hub_server import Account, HubServer
from adapterhub_lite.hub_server.routes import ROUTES
from adapterhub_lite.hub_server.transfer import TRANSFER_ROUTES

TOKENS = {
    "hf_ann": Account("ann", orgs=("team",)),
    "hf_ann_reads": Account("ann", role="read"),
    "hf_bob": Account("bob"),
}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", tokens=TOKENS) as server:
        yield server


def client(server: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=server.url, token=token)


def test_private_repositories_exist_for_their_owners_only(guarded: HubServer) -> None:
    client(guarded, "hf_ann").create_repo("team/secret", private=True)
    client(guarded, "hf_ann").create_repo("ann/open")
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError):
            client(guarded, token).model_info("team/secret")
        assert [model.id for model in client(guarded, token).list_models()] == ["ann/open"]
    assert client(guarded, "hf_ann").model_info("team/secret").private
    client(guarded, "hf_ann").update_repo_settings("team/secret", private=False)
    assert not client(guarded).model_info("team/secret").private


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_wrong", 401), ("hf_ann_reads", 403), ("hf_bob", 403)])
def test_writing_needs_a_write_token_of_the_owner(guarded: HubServer, token: str | bool, status: int) -> None:
    client(guarded, "hf_ann").create_repo("ann/open")
    with pytest.raises(HfHubHTTPError, match=str(status)):
        client(guarded, token).upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="ann/open")
    with pytest.raises(HfHubHTTPError, match=str(status)):
        client(guarded, token).create_repo("ann/new")
    with pytest.raises(HfHubHTTPError, match=str(status)):
        client(guarded, token).delete_repo("ann/open")


def test_gated_files_need_an_account_that_was_let_in(guarded: HubServer, tmp_path: Path) -> None:
    owner = client(guarded, "hf_ann")
    owner.create_repo("ann/gated")
    owner.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="ann/gated")
    owner.update_repo_settings("ann/gated", gated="manual")
    assert client(guarded, "hf_bob").model_info("ann/gated").gated == "manual"
    for token in (False, "hf_bob"):
        with pytest.raises(GatedRepoError):
            hf_hub_download("ann/gated", "a.txt", endpoint=guarded.url, token=token, cache_dir=tmp_path / "cache")
    assert hf_hub_download("ann/gated", "a.txt", endpoint=guarded.url, token="hf_ann", cache_dir=tmp_path / "cache")


def test_whoami_tells_role_and_organisations(guarded: HubServer) -> None:
    assert [org["name"] for org in client(guarded, "hf_ann").whoami()["orgs"]] == ["team"]
    assert client(guarded, "hf_ann_reads").whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client(guarded, "hf_wrong").whoami()


def test_a_taken_port_is_one_sentence(guarded: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="not free"):
        HubServer(tmp_path / "second", port=int(guarded.url.rpartition(":")[2]))


def test_two_hubs_never_share_a_folder(guarded: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="Another hub is running"):
        HubServer(tmp_path / "hub")
    assert client(guarded, "hf_ann").whoami()["name"] == "ann"


HEADER = '{"key": "header", "value": {"summary": "s"}}'
# A body that a caller with the right to write could send, for every route that is no reading; None where there is none.
BODIES: dict[str, object] = {
    "create": {"name": "new", "organization": "ann"},
    "delete": {"name": "open", "organization": "ann"},
    "move": {"fromRepo": "ann/open", "toRepo": "ann/new"},
    "settings": {"private": True},
    "add_tag": {"tag": "v2"},
    "drop_tag": None,
    "add_branch": {},
    "drop_branch": None,
    "squash": {},
    "duplicate": {"repository": "ann/new"},
    "duplicate_files": {"target": {"name": "ann/open"}, "files": []},
    "preupload": {"files": []},
    "commit": HEADER,
    "batch": {"objects": [{"oid": "0" * 64, "size": 1}]},
    "upload": "x",
    "complete": None,
    "verify": None,
}
# These write nothing, whoever asks.
READING = ("validate", "paths_info")


def writing_routes() -> list[tuple[str, str, str]]:
    return [
        route for route in (*ROUTES, *TRANSFER_ROUTES) if route[0] not in ("GET", "HEAD") and route[2] not in READING
    ]


def stored(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("token", "status"), [("hf_ann_reads", 403), ("hf_bob", 403), (None, 401), ("hf_wrong", 401)])
def test_no_route_writes_for_who_may_not(guarded: HubServer, tmp_path: Path, token: str | None, status: int) -> None:
    """Each route that is no reading, from the table of routes itself: a new one without a body here fails."""
    for kind in ("model", "dataset"):
        client(guarded, "hf_ann").create_repo("ann/open", repo_type=kind)
        client(guarded, "hf_ann").create_tag("ann/open", tag="v1", repo_type=kind)
    before = stored(tmp_path / "hub")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for method, route, name in writing_routes():
        for kinds in ("models", "datasets"):
            if route.startswith("/{kinds}") and kinds == "models":
                continue
            named = {
                "kinds": kinds,
                "ns": "ann",
                "name": "open",
                "rev": "main",
                "ref": "v1",
                "ticket": "0" * 32,
                "part": 1,
            }
            body = BODIES[name]
            if isinstance(body, dict) and route.startswith("/api/repos"):
                body = {**body, "type": kinds[:-1]}
            content = body if isinstance(body, str) else json.dumps(body) if body is not None else None
            answer = httpx.request(
                method, guarded.url + route.format(**named), content=content,
                headers={**headers, "Content-Type": "application/json"},
            )  # fmt: skip
            # An upload goes to an address that only a writer was given, which is its right to write.
            expected = 403 if "ticket" in route else status
            assert answer.status_code == expected, (method, route, answer.status_code, answer.text)
    writes = f"{guarded.url}/api/models/ann/open/xet-write-token/main"
    assert httpx.get(writes, headers=headers).status_code == status
    assert stored(tmp_path / "hub") == before


def test_the_table_of_bodies_is_the_table_of_routes() -> None:
    assert {name for _, _, name in writing_routes()} == BODIES.keys()
