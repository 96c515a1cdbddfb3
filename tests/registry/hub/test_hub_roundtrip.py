"""A version goes to a hub and comes back on another machine with the same bytes, for us and for plain PEFT."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from adapterhub_lite.adapter_format.manifest import OriginRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import (
    AdapterRejectedError,
    AliasConflictError,
    HubUnreachableError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import push_alias, remote_aliases
from adapterhub_lite.registry.hub.pull import pull_adapter
from adapterhub_lite.registry.hub.push import push_adapter
from tests.xet import need_xet

REPO = "org/sql-lora"


@pytest.fixture
def elsewhere(tmp_path: Path) -> AdapterRegistry:
    """The registry of another machine."""
    return AdapterRegistry(tmp_path / "elsewhere")


@pytest.mark.parametrize("transfer", ["lfs", "xet"])
def test_what_was_pushed_is_pulled_byte_for_byte(
    registry: AdapterRegistry,
    elsewhere: AdapterRegistry,
    adapter: Path,
    base: ResolvedBase,
    hub_server: HubServer,
    transfer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if transfer == "xet":
        need_xet()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "lfs")
    here = registry.add(adapter, "sql", base=base)
    steps: list[str] = []
    pushed = registry.push("sql", REPO, endpoint=hub_server.url, progress=steps.append)
    assert (pushed.tag, pushed.uploaded, pushed.commits_sent) == ("v1", True, 1)
    assert steps == [f"creating {REPO}", "publishing sql:1", "tagging v1"]
    pulled = elsewhere.pull(REPO, endpoint=hub_server.url)
    assert (pulled.manifest.published(), pulled.commit, pulled.source) == (here, pushed.commit, "hub")
    assert pulled.manifest.reference == "sql-lora:1"
    assert pulled.manifest.origin == OriginRecord(repo_id=REPO, commit=pushed.commit, name="sql", version=1)
    for name in here.files:
        assert elsewhere.file(pulled.manifest, name).read_bytes() == registry.file(here, name).read_bytes()
    assert not list((elsewhere.home / "hub").glob("*/")), "what was fetched is not kept twice"


def test_a_second_push_of_a_digest_does_nothing_and_says_so(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    registry.add(adapter, "sql", base=base)
    first = push_adapter(registry.store, "sql", REPO, endpoint=hub_server.url)
    hub_server.faults.clear()
    again = push_adapter(registry.store, "sql", REPO, endpoint=hub_server.url)
    assert (again.commit, again.tag, again.uploaded, again.commits_sent) == (first.commit, "v1", False, 0)
    assert not [exchange for exchange in hub_server.faults.log if "/commit/" in exchange.path]


def test_a_second_pull_fetches_no_weights(
    registry: AdapterRegistry, elsewhere: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    registry.add(adapter, "sql", base=base)
    registry.push("sql", REPO, endpoint=hub_server.url)
    first = elsewhere.pull(REPO, revision="v1", endpoint=hub_server.url)
    hub_server.faults.clear()
    again = elsewhere.pull(REPO, revision="v1", endpoint=hub_server.url)
    assert (again.manifest, again.source) == (first.manifest, "store")
    assert not [exchange for exchange in hub_server.faults.log if "safetensors" in exchange.path]


@pytest.mark.parametrize("damage", ["flipped", "cut short", "missing"])
def test_a_pull_mends_what_is_damaged_here(
    registry: AdapterRegistry,
    elsewhere: AdapterRegistry,
    adapter: Path,
    base: ResolvedBase,
    hub_server: HubServer,
    damage: str,
) -> None:
    registry.add(adapter, "sql", base=base)
    registry.push("sql", REPO, endpoint=hub_server.url)
    manifest = elsewhere.pull(REPO, endpoint=hub_server.url).manifest
    path = elsewhere.file(manifest, "adapter_model.safetensors")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flipped" else b""))
    assert elsewhere.examine().problems
    assert elsewhere.pull(REPO, endpoint=hub_server.url).source == "hub"
    assert elsewhere.examine().problems == ()
    assert path.read_bytes() == content


def test_versions_are_tags_and_the_newest_is_pulled_by_default(
    registry: AdapterRegistry,
    elsewhere: AdapterRegistry,
    adapter: Path,
    other_adapter: Path,
    base: ResolvedBase,
    hub_server: HubServer,
) -> None:
    registry.add(adapter, "sql", base=base)
    registry.add(other_adapter, "sql", base=base)
    newer = push_adapter(registry.store, "sql:2", REPO, endpoint=hub_server.url)
    older = push_adapter(registry.store, "sql:1", REPO, endpoint=hub_server.url)
    assert pull_adapter(elsewhere.store, REPO, endpoint=hub_server.url).commit == newer.commit
    assert pull_adapter(elsewhere.store, REPO, revision="v1", endpoint=hub_server.url).commit == older.commit
    assert pull_adapter(elsewhere.store, REPO, revision=older.commit, endpoint=hub_server.url).source == "store"
    found = {m.version: m.origin.version if m.origin else None for m in elsewhere.list("sql-lora")}
    assert found == {1: 2, 2: 1}, "numbered as they came"
    with pytest.raises(UnknownNameError):
        pull_adapter(elsewhere.store, REPO, revision="v7", endpoint=hub_server.url)


@pytest.mark.parametrize("revision", ["../v1", "v1/../../x", "", "@7", "a b", "/v1", "a//b", "refs/heads/"])
def test_a_revision_that_is_none_is_refused_before_any_request(
    elsewhere: AdapterRegistry, hub_server: HubServer, revision: str
) -> None:
    with pytest.raises(UsageError, match="revision"):
        elsewhere.pull(REPO, revision=revision, endpoint=hub_server.url)
    assert hub_server.faults.log == []


def test_aliases_move_by_compare_and_swap_and_are_pulled(
    registry: AdapterRegistry, elsewhere: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    registry.add(adapter, "sql", base=base)
    registry.push("sql", REPO, endpoint=hub_server.url)
    assert push_alias(REPO, "prod", 1, expect=0, endpoint=hub_server.url) == {"prod": 1}
    assert push_alias(REPO, "beta", 1, endpoint=hub_server.url) == {"beta": 1, "prod": 1}
    with pytest.raises(AliasConflictError):
        push_alias(REPO, "prod", None, expect=2, endpoint=hub_server.url)
    with pytest.raises(UnknownNameError, match="v9"):
        push_alias(REPO, "prod", 9, endpoint=hub_server.url)
    pulled = elsewhere.pull(REPO, revision="@prod", endpoint=hub_server.url).manifest
    assert pulled.origin is not None and (pulled.origin.version, pulled.origin.aliases) == (1, ("beta", "prod"))
    assert elsewhere.aliases("sql-lora") == {}, "an alias of the hub moves none of ours"
    elsewhere.pull(REPO, revision="@prod", alias="live", endpoint=hub_server.url)
    assert elsewhere.resolve("sql-lora@live") == pulled
    assert push_alias(REPO, "prod", None, endpoint=hub_server.url) == {"beta": 1}
    assert remote_aliases(REPO, endpoint=hub_server.url) == {"beta": 1}
    with pytest.raises(UnknownNameError, match="alias"):
        elsewhere.pull(REPO, revision="@prod", endpoint=hub_server.url)
    assert registry.push("sql", REPO, endpoint=hub_server.url).uploaded is False


def test_offline_is_asked_for_and_said(
    registry: AdapterRegistry, elsewhere: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    registry.add(adapter, "sql", base=base)
    with HubServer(tmp_path / "hub") as hub:
        registry.push("sql", REPO, endpoint=hub.url)
        with pytest.raises(HubUnreachableError, match="not pulled here"):
            elsewhere.pull(REPO, revision="v1", endpoint=hub.url, offline=True)
        online = elsewhere.pull(REPO, revision="v1", endpoint=hub.url)
        hub.faults.clear()
        offline = elsewhere.pull(REPO, revision="v1", endpoint=hub.url, offline=True)
        assert hub.faults.log == []
    assert (offline.manifest, offline.commit, offline.source) == (online.manifest, online.commit, "offline")
    path = elsewhere.file(online.manifest, "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(HubUnreachableError, match="or what was pulled is gone"):
        elsewhere.pull(REPO, revision="v1", endpoint=hub.url, offline=True)


def test_a_pull_replays_the_probes_where_that_is_asked_for(
    registry: AdapterRegistry, elsewhere: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    registry.add(adapter, "sql", base=base, verify="probes")
    registry.push("sql", REPO, endpoint=hub_server.url)
    with pytest.raises(UsageError, match="need their base"):
        elsewhere.pull(REPO, endpoint=hub_server.url, verify="probes")
    assert elsewhere.list() == []
    for source in ("hub", "store"):
        pulled = elsewhere.pull(REPO, endpoint=hub_server.url, verify="probes", base=base)
        assert (pulled.source, pulled.manifest.published()) == (source, registry.resolve("sql"))
    with pytest.raises(UsageError, match="need their base"):
        elsewhere.pull(REPO, endpoint=hub_server.url, verify="probes")


PLAIN_PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ours, plain, base, folder = sys.argv[1:]
models = [AutoModelForCausalLM.from_pretrained(base) for _ in range(2)]
local = PeftModel.from_pretrained(models[0], folder)
pulled = PeftModel.from_pretrained(models[1], ours, revision="v1")
tokens = torch.arange(8)[None]
assert torch.equal(local(tokens).logits, pulled(tokens).logits)
local.push_to_hub(plain, token="hf_x")
"""


def test_plain_peft_reads_what_we_pushed_and_we_adopt_what_it_pushed(
    registry: AdapterRegistry,
    elsewhere: AdapterRegistry,
    adapter: Path,
    base: ResolvedBase,
    tiny_base: Path,
    hub_server: HubServer,
    tmp_path: Path,
) -> None:
    registry.add(adapter, "sql", base=base)
    registry.push("sql", REPO, endpoint=hub_server.url)
    plain = "org/plain-lora"
    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", PLAIN_PEFT, REPO, plain, str(tiny_base), str(adapter)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AdapterRejectedError, match="adopt"):
        elsewhere.pull(plain, endpoint=hub_server.url, base=base)
    receipt = elsewhere.pull(plain, endpoint=hub_server.url, base=base, adopt=True)
    assert elsewhere.pull(plain, endpoint=hub_server.url, base=base, adopt=True).source == "store", "adopted once"
    assert (receipt.manifest.reference, receipt.source) == ("plain-lora:1", "hub")
    assert receipt.commit == HfApi(endpoint=hub_server.url, token=False).model_info(plain).sha
    kept = elsewhere.file(receipt.manifest, "adapter_model.safetensors")
    assert kept.read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert receipt.manifest.digest == registry.resolve("sql").digest


def test_an_adopted_adapter_keeps_the_chat_template_it_was_trained_with(
    elsewhere: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    api = HfApi(endpoint=hub_server.url, token=False)
    api.create_repo("org/own-words")
    api.upload_folder(repo_id="org/own-words", folder_path=adapter, allow_patterns="adapter_*")
    api.upload_file(path_or_fileobj=template.encode(), path_in_repo="chat_template.jinja", repo_id="org/own-words")
    manifest = elsewhere.pull("org/own-words", endpoint=hub_server.url, base=base, adopt=True).manifest
    assert elsewhere.file(manifest, "chat_template.jinja").read_text() == template


def test_an_adapter_in_a_folder_of_a_repository_is_adopted_at_a_revision(
    elsewhere: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer
) -> None:
    api = HfApi(endpoint=hub_server.url, token="hf_any")
    api.create_repo("org/run")
    commit = api.upload_folder(
        repo_id="org/run", folder_path=adapter, path_in_repo="checkpoint-5", ignore_patterns=["README.md"]
    ).oid
    options: dict[str, Any] = {"adopt": True, "base": base, "endpoint": hub_server.url, "revision": commit}
    manifest = elsewhere.pull("org/run", subfolder="checkpoint-5", **options).manifest
    assert manifest.name == "run" and manifest.lora.modules_bound == 6
    with pytest.raises(AdapterRejectedError, match=r"no adapter_config\.json"):
        elsewhere.pull("org/run", **options)
    for wrong in ("../x", "/x", "a//b", ".git", ""):
        with pytest.raises(UsageError, match="folder of an adapter"):
            elsewhere.pull("org/run", subfolder=wrong, **options)
