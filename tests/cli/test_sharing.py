"""`push`, `pull` and `hub` as a user meets them: what was done, what was not, and where bytes came from."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from tests.cli.outcome import Run
from tests.fixture_types import MakeAdapter

REPO = "org/sql-lora"


@pytest.fixture(autouse=True)
def classic_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def test_push_and_pull_say_what_they_did(
    stocked: AdapterRegistry,
    run: Run,
    hub_server: HubServer,
    tmp_path: Path,
) -> None:
    there = ("--endpoint", hub_server.url)
    first = run("push", "sql:1", REPO, "--alias", "prod", *there)
    assert first.returncode == 0, first.stderr
    assert "publishing sql:1" in first.stderr and f"{REPO}@prod points to v1" in first.stderr
    again = run("push", "sql:1", REPO, *there)
    assert "was already published" in again.stderr and "Nothing was sent" in again.stderr
    assert json.loads(run("push", "sql:2", REPO, *there, "--json").stdout)["uploaded"] is True
    elsewhere = (*there, "--home", str(tmp_path / "elsewhere"))
    pulled = run("pull", REPO, "--revision", "@prod", *elsewhere)
    assert pulled.returncode == 0, pulled.stderr
    assert "sql-lora:1" in pulled.stderr and "fetched from the hub" in pulled.stderr
    assert "already in the registry" in run("pull", REPO, "--revision", "@prod", *elsewhere).stderr
    offline = run("pull", REPO, "--revision", "@prod", "--offline", *elsewhere)
    assert "the hub was not asked" in offline.stderr
    assert json.loads(run("pull", REPO, *elsewhere, "--json").stdout)["source"] == "hub"
    for arguments in (
        (),
        (REPO, "--locked"),
        ("--locked", "--probes"),
        (REPO, "--revision", "../x"),
        (REPO, "--name", "a/b"),
    ):
        assert run("pull", *arguments, *elsewhere).returncode == 2


def test_what_plain_peft_made_is_adopted_once(
    run: Run,
    hub_server: HubServer,
    make_adapter: MakeAdapter,
    tiny_base: Path,
    home: Path,
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub_server.url, token=False)
    api.create_repo("org/plain")
    api.upload_folder(repo_id="org/plain", folder_path=make_adapter(seed=1), allow_patterns="adapter_*")
    pull = ("pull", "org/plain", "--endpoint", hub_server.url)
    assert "adopt" in run(*pull).stderr
    for source in ("hub", "store"):
        adopted = run(*pull, "--adopt", "--probes", "--base", str(tiny_base), "--json")
        assert adopted.returncode == 0, adopted.stderr
        assert json.loads(adopted.stdout)["source"] == source
    (manifest,) = AdapterRegistry(home).list()
    assert (manifest.name, "probes.safetensors" in manifest.files) == ("plain", True)


def test_another_machine_pulls_what_is_locked(
    stocked: AdapterRegistry,
    run: Run,
    hub_server: HubServer,
    tmp_path: Path,
) -> None:
    there, lock = ("--endpoint", hub_server.url), ("--file", str(tmp_path / "adapters.lock"))
    assert run("push", "sql:2", REPO, *there).returncode == 0
    assert run("lock", f"sql:2={REPO}", *lock).returncode == 0
    locked = ("pull", "--locked", *lock, *there, "--home", str(tmp_path / "elsewhere"), "--json")
    first = run(*locked)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["pulled"] == ["sql:2"]
    assert json.loads(run(*locked).stdout)["pulled"] == []
    (pulled,) = AdapterRegistry(tmp_path / "elsewhere").list()
    assert (pulled.reference, pulled.published()) == ("sql:2", stocked.resolve("sql:2"))


def test_a_hub_of_ones_own_with_tokens(stocked: AdapterRegistry, tmp_path: Path) -> None:
    """The hub and its clients as processes: HF_ENDPOINT and HF_TOKEN are all they are told."""
    command = [str(Path(sys.executable).with_name("adapterhub-lite"))]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1"}
    tokens = ["--token", "ann,team=hf_ann", "--token", "bob:read=hf_bob"]
    hub = subprocess.Popen(
        [*command, "hub", "--data", str(tmp_path / "hub"), "--port", "0", *tokens, "--json"],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert hub.stdout is not None
    url = json.loads("".join(iter(hub.stdout.readline, "}\n")) + "}")["url"]

    def client(token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        told = {**environment, "HF_ENDPOINT": url, "HF_TOKEN": token}
        return subprocess.run([*command, *arguments], capture_output=True, text=True, env=told)

    try:
        pushed = client("hf_ann", "push", "sql:1", "team/secret", "--private")
        assert pushed.returncode == 0, pushed.stderr
        refused = client("hf_bob", "push", "sql:1", "bob/sql")
        assert refused.returncode == 2 and "read-only" in refused.stderr
        hidden = client("hf_bob", "pull", "team/secret", "--home", str(tmp_path / "bob"))
        assert hidden.returncode == 2 and "'bob' may not see it" in hidden.stderr
        assert client("hf_ann", "pull", "team/secret", "--home", str(tmp_path / "ann")).returncode == 0
    finally:
        hub.send_signal(signal.SIGTERM)
        hub.communicate()
    assert hub.returncode == 0


@pytest.mark.parametrize("token", ["secret", "=secret", "ann=", "ann:admin=secret", "ann,,team=secret"])
def test_a_token_that_is_none_is_refused_and_not_repeated(run: Run, token: str, tmp_path: Path) -> None:
    outcome = run("hub", "--data", str(tmp_path), "--port", "0", "--token", token)
    assert outcome.returncode == 2 and "OWNER=TOKEN" in outcome.stderr
    assert "secret" not in outcome.stderr
