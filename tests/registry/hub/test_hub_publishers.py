"""Many publishers, one repository: every version once, none lost, whoever comes first."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.errors import HubUnreachableError, PublishConflictError
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import HubRepo, push_alias, remote_aliases
from adapterhub_lite.registry.hub.receipts import PushReceipt
from tests.xet import need_xet

REPO, PUBLISHERS = "org/sql-lora", 8


@pytest.fixture(autouse=True)
def classic_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


@pytest.fixture
def eight(registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path) -> AdapterRegistry:
    """Eight versions with eight digests: the same adapter with eight different scalings."""
    for alpha in range(1, PUBLISHERS + 1):
        folder = tmp_path / f"alpha-{alpha}"
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": alpha}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        registry.add(folder, "sql", base=base)
    return registry


def everything_is_there_once(registry: AdapterRegistry, hub: HubServer, elsewhere: AdapterRegistry) -> None:
    repo = HubRepo(REPO, endpoint=hub.url)
    titles = [commit.text.splitlines()[0] for commit in repo.log(repo.head())]
    assert sorted(titles) == sorted(["initial commit", *(f"sql v{n}" for n in range(1, PUBLISHERS + 1))])
    assert set(repo.tags()) == {f"v{n}" for n in range(1, PUBLISHERS + 1)}
    for version in range(1, PUBLISHERS + 1):
        pulled = elsewhere.pull(REPO, revision=f"v{version}", endpoint=hub.url)
        assert pulled.manifest.published() == registry.resolve(f"sql:{version}")


def test_eight_threads(eight: AdapterRegistry, hub_server: HubServer, tmp_path: Path) -> None:
    with ThreadPoolExecutor(PUBLISHERS) as pool:
        receipts = list(
            pool.map(lambda n: eight.push(f"sql:{n}", REPO, endpoint=hub_server.url), range(1, PUBLISHERS + 1))
        )
    assert all(receipt.uploaded for receipt in receipts)
    everything_is_there_once(eight, hub_server, AdapterRegistry(tmp_path / "elsewhere"))


@pytest.mark.slow
def test_eight_processes(eight: AdapterRegistry, hub_server: HubServer, tmp_path: Path) -> None:
    program = """
import sys
from adapterhub_lite.registry import AdapterRegistry
AdapterRegistry().push(*sys.argv[1:3], endpoint=sys.argv[3])
"""
    running = [
        subprocess.Popen([sys.executable, "-c", program, f"sql:{n}", REPO, hub_server.url], stderr=subprocess.PIPE)
        for n in range(1, PUBLISHERS + 1)
    ]
    for process in running:
        assert process.wait() == 0, process.stderr and process.stderr.read().decode()
        assert process.stderr is not None
        process.stderr.close()
    everything_is_there_once(eight, hub_server, AdapterRegistry(tmp_path / "elsewhere"))


@pytest.mark.parametrize("kills", [pytest.param(25, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.soak)])
def test_sigkill_at_random_instants(kills: int, eight: AdapterRegistry, hub_server: HubServer, tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).with_name("hub_kill_driver.py"), eight.home, tmp_path / "there"]
    words = [str(word) for word in (*command, hub_server.url, kills, 0)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [] and found["acts"] > 0, found


def test_the_same_version_from_many_sides_is_one_commit(eight: AdapterRegistry, hub_server: HubServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(lambda _: eight.push("sql:1", REPO, endpoint=hub_server.url), range(4)))
    assert len({receipt.commit for receipt in receipts}) == 1
    assert sum(receipt.uploaded for receipt in receipts) >= 1
    repo = HubRepo(REPO, endpoint=hub_server.url)
    assert len(repo.log(repo.head())) == 2


def test_two_adapters_for_one_number_leave_one_and_an_error(
    eight: AdapterRegistry, other_adapter: Path, base: ResolvedBase, hub_server: HubServer, tmp_path: Path
) -> None:
    colleague = AdapterRegistry(tmp_path / "colleague")
    colleague.add(other_adapter, "sql", base=base)

    def attempt(registry: AdapterRegistry) -> PushReceipt | PublishConflictError:
        try:
            return registry.push("sql:1", REPO, endpoint=hub_server.url)
        except PublishConflictError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(attempt, (eight, colleague)))
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["PublishConflictError", "PushReceipt"]
    repo = HubRepo(REPO, endpoint=hub_server.url)
    assert len(repo.log(repo.head())) == 2


def test_aliases_set_at_the_same_time_are_all_kept(eight: AdapterRegistry, hub_server: HubServer) -> None:
    eight.push("sql:1", REPO, endpoint=hub_server.url)
    names = [f"alias-{n}" for n in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: push_alias(REPO, name, 1, endpoint=hub_server.url), names))
    assert remote_aliases(REPO, endpoint=hub_server.url) == dict.fromkeys(names, 1)


def test_who_never_gets_a_turn_gives_up_and_says_why(
    eight: AdapterRegistry, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a token that may only open pull requests, which is answered 412 for ever (datasets#7777)."""
    monkeypatch.setattr("adapterhub_lite.registry.hub.push.WRITE_TRIES", 3)
    repo = HubRepo(REPO, endpoint=hub_server.url)
    steps = []

    def cut_in(step: str) -> None:
        steps.append(step)
        if step.startswith("publishing"):
            repo.commit(repo.head(), "somebody else's", "", {"notes.txt": str(len(steps)).encode()}, [])

    with pytest.raises(PublishConflictError, match=r"Others kept publishing .* sql:1"):
        eight.push("sql:1", REPO, endpoint=hub_server.url, progress=cut_in)
    assert sum(step.startswith("publishing") for step in steps) == 3
    assert repo.tags() == {}


def test_an_alias_on_a_hub_that_stays_away_is_given_up_on(
    eight: AdapterRegistry, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight.push("sql:1", REPO, endpoint=hub_server.url)
    monkeypatch.setattr("adapterhub_lite.registry.hub.client.TRIES", 2)
    fault = hub_server.faults.add("503", "/commit/", times=99)
    with pytest.raises(HubUnreachableError, match="503"):
        push_alias(REPO, "prod", 1, endpoint=hub_server.url)
    assert fault.times == 97
    hub_server.faults.clear()
    hub_server.faults.add("lost_response", "/commit/")
    assert push_alias(REPO, "prod", 1, endpoint=hub_server.url) == {"prod": 1}
    assert len(HubRepo(REPO, endpoint=hub_server.url).log(HubRepo(REPO, endpoint=hub_server.url).head())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["lfs", "xet"])
def test_twenty_megabytes(
    registry: AdapterRegistry,
    byte_tokenizer: Any,
    hub_server: HubServer,
    tmp_path: Path,
    transfer: str,
    monkeypatch: Any,
) -> None:
    if transfer == "xet":
        need_xet()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", transfer == "lfs")
    folder, base = large_adapter(tmp_path, byte_tokenizer)
    manifest = registry.add(folder, "large", base=resolve_base(base))
    assert manifest.files["adapter_model.safetensors"].size > 20_000_000
    registry.push("large", REPO, endpoint=hub_server.url)
    elsewhere = AdapterRegistry(tmp_path / "elsewhere")
    assert elsewhere.pull(REPO, endpoint=hub_server.url).manifest.published() == manifest
    name = "adapter_model.safetensors"
    assert elsewhere.file(manifest, name).read_bytes() == registry.file(manifest, name).read_bytes()
    over_http = [one for one in hub_server.faults.log if one.method == "PUT" or one.sent > 20_000_000]
    assert bool(over_http) == (transfer == "lfs")


def large_adapter(folder: Path, tokenizer: Any) -> tuple[Path, Path]:
    """(adapter of 21 MB, its random base of 27 MB)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=272, tie_word_embeddings=True, **shape))
    model.save_pretrained(folder / "large-base")
    tokenizer.save_pretrained(folder / "large-base")
    model.name_or_path = str(folder / "large-base")
    adapted = get_peft_model(model, LoraConfig(r=128, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "large-adapter")
    return folder / "large-adapter", folder / "large-base"


PUSHER = """
import sys
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.errors import AdapterHubError
home, url, version = sys.argv[1:]
try:
    print("pushed", AdapterRegistry(home).push(f"sql:{version}", "org/sql-lora", endpoint=url).tag)
except AdapterHubError as error:
    print(type(error).__name__, error)
"""
COLLECTOR = """
import select, sys
from adapterhub_lite.registry import AdapterRegistry
registry = AdapterRegistry(sys.argv[1])
print("ready", flush=True)
while registry.list():
    registry.gc(keep_newest=0)
    if sys.stdin in select.select([sys.stdin], [], [], 0)[0]:
        break
print("all gone" if not registry.list() else "told to end")
"""


@pytest.mark.slow
def test_what_is_pushed_beside_a_collection_in_other_processes_is_whole_or_not_there(
    eight: AdapterRegistry, hub_server: HubServer, tmp_path: Path
) -> None:
    """Nothing refers to the versions but the pushes; collectors take whatever no push holds."""
    originals = {version: eight.resolve(f"sql:{version}") for version in range(1, PUBLISHERS + 1)}

    def start(program: str, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", program, str(eight.home), *words]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    pushers = [start(PUSHER, hub_server.url, str(version)) for version in originals]
    hub = HubRepo(REPO, endpoint=hub_server.url)
    while not hub.exists() and any(one.poll() is None for one in pushers):
        continue
    collectors = [start(COLLECTOR), start(COLLECTOR)]
    said = {version: one.communicate() for version, one in zip(originals, pushers, strict=True)}
    ended = [one.communicate("end\n")[0] for one in collectors]
    assert all("all gone" in text or "told to end" in text for text in ended), ended
    elsewhere, tags = AdapterRegistry(tmp_path / "elsewhere"), set(hub.tags())
    for version, (out, complaint) in said.items():
        pushed = out.startswith(f"pushed v{version}")
        assert pushed or out.startswith("UnknownNameError"), (out, complaint)
        assert (f"v{version}" in tags) is pushed
        if pushed:
            pulled = elsewhere.pull(REPO, revision=f"v{version}", endpoint=hub_server.url).manifest
            assert pulled.published() == originals[version]
    assert tags, "at least the push that made the repository"
    assert eight.examine().problems == ()
