"""A hub that lies: nothing it serves gets in unless the manifest, the tag and the rules agree."""

import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import (
    AdapterHubError,
    AdapterRejectedError,
    IntegrityError,
    SchemaVersionError,
    UnknownNameError,
)
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry

REPO = "org/sql-lora"


@pytest.fixture
def api(hub_server: HubServer, registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> HfApi:
    registry.add(adapter, "sql", base=base)
    registry.push("sql", REPO, endpoint=hub_server.url)
    return HfApi(endpoint=hub_server.url, token=False)


@pytest.fixture
def elsewhere(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "elsewhere")


def put(api: HfApi, name: str, content: bytes, tag: str = "v2") -> None:
    done = api.create_commit(REPO, [CommitOperationAdd(name, content)], commit_message="by hand")
    api.create_tag(REPO, tag=tag, revision=done.oid)


def changed(registry: AdapterRegistry, **changes: object) -> bytes:
    return json.dumps(registry.resolve("sql").model_dump(mode="json") | changes).encode()


def refused(elsewhere: AdapterRegistry, hub: HubServer, error: type[AdapterHubError], text: str) -> None:
    with pytest.raises(error, match=text):
        elsewhere.pull(REPO, revision="v2", endpoint=hub.url)
    with pytest.raises(UnknownNameError):
        elsewhere.resolve(REPO.rpartition("/")[2])


def test_a_manifest_under_another_tag(
    api: HfApi, registry: AdapterRegistry, elsewhere: AdapterRegistry, hub_server: HubServer
) -> None:
    put(api, "adapterhub.json", changed(registry, version=7))
    refused(elsewhere, hub_server, IntegrityError, "says v2, its manifest says v7")


def test_weights_exchanged_under_the_manifest(
    api: HfApi, elsewhere: AdapterRegistry, other_adapter: Path, hub_server: HubServer
) -> None:
    name = "adapter_model.safetensors"
    done = api.create_commit(
        REPO, [CommitOperationAdd(name, (other_adapter / name).read_bytes())], commit_message="evil"
    )
    with pytest.raises(IntegrityError):
        elsewhere.pull(REPO, revision=done.oid, endpoint=hub_server.url)
    with pytest.raises(UnknownNameError):
        elsewhere.resolve(REPO.rpartition("/")[2])


@pytest.mark.parametrize("name", ["../../escape", "tokenizer.json", "/etc/passwd", "weights.pkl"])
def test_files_that_no_adapter_has(
    api: HfApi, registry: AdapterRegistry, elsewhere: AdapterRegistry, hub_server: HubServer, name: str
) -> None:
    files = registry.resolve("sql").model_dump(mode="json")["files"] | {name: {"sha256": "0" * 64, "size": 3}}
    put(api, "adapterhub.json", changed(registry, version=2, files=files))
    hub_server.faults.clear()
    refused(elsewhere, hub_server, AdapterRejectedError, "does not belong to an adapter")
    assert not [one for one in hub_server.faults.log if "safetensors" in one.path], "refused before any weights"


def test_sizes_that_are_not_the_promised_ones(
    api: HfApi, registry: AdapterRegistry, elsewhere: AdapterRegistry, hub_server: HubServer
) -> None:
    files = registry.resolve("sql").model_dump(mode="json")["files"]
    files["adapter_model.safetensors"]["size"] += 1
    put(api, "adapterhub.json", changed(registry, version=2, files=files))
    refused(elsewhere, hub_server, AdapterRejectedError, "were promised")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_promised_file_that_is_missing(
    api: HfApi, elsewhere: AdapterRegistry, hub_server: HubServer, name: str
) -> None:
    api.delete_file(name, REPO)
    with pytest.raises(AdapterRejectedError, match=f"{name} has 0 bytes"):
        elsewhere.pull(REPO, revision="main", endpoint=hub_server.url)


def test_a_manifest_of_the_future(
    api: HfApi, registry: AdapterRegistry, elsewhere: AdapterRegistry, hub_server: HubServer
) -> None:
    put(api, "adapterhub.json", changed(registry, schema_version=99))
    refused(elsewhere, hub_server, SchemaVersionError, "schema version 99")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"prod": "1"}', b'{"../x": 1}'])
def test_an_alias_table_that_is_none(
    api: HfApi, elsewhere: AdapterRegistry, hub_server: HubServer, content: bytes
) -> None:
    api.upload_file(path_or_fileobj=content, path_in_repo="aliases.json", repo_id=REPO)
    with pytest.raises(IntegrityError, match="not a table of aliases"):
        elsewhere.pull(REPO, revision="@prod", endpoint=hub_server.url)


def test_what_lies_beside_an_adapter_is_left_there(
    api: HfApi, elsewhere: AdapterRegistry, hub_server: HubServer
) -> None:
    for name in ("tokenizer.json", "evil.pkl", "modeling.py"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=REPO)
    hub_server.faults.clear()
    elsewhere.pull(REPO, revision="main", endpoint=hub_server.url)
    fetched = {one.path.rpartition("/")[2] for one in hub_server.faults.log if "/resolve/" in one.path}
    assert fetched <= {"adapterhub.json", "adapter_config.json", "adapter_model.safetensors", "probes.safetensors"}


def test_adopting_needs_the_two_files_of_an_adapter(elsewhere: AdapterRegistry, hub_server: HubServer) -> None:
    HfApi(endpoint=hub_server.url, token=False).create_repo("org/empty")
    with pytest.raises(AdapterRejectedError, match="it has no adapter_config"):
        elsewhere.pull("org/empty", endpoint=hub_server.url, adopt=True)


def test_adopted_bytes_are_those_that_the_hub_lists(
    elsewhere: AdapterRegistry,
    adapter: Path,
    base: ResolvedBase,
    hub_server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    api = HfApi(endpoint=hub_server.url, token=False)
    api.create_repo("org/plain")
    api.upload_folder(repo_id="org/plain", folder_path=adapter, allow_patterns="adapter_*")
    hub_server.faults.add("flipped_byte", "safetensors", method="GET")
    with pytest.raises(IntegrityError, match="Pull again"):
        elsewhere.pull("org/plain", endpoint=hub_server.url, adopt=True, base=base)
    assert elsewhere.pull("org/plain", endpoint=hub_server.url, adopt=True, base=base).manifest.version == 1
