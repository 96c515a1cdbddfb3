"""The card is made from the manifest, and valid whatever stands in it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.adapter_format.manifest import (
    LOSS_FILE,
    BaseRecord,
    DataRecord,
    MemoryRecord,
    ParentRecord,
    TextRecord,
    TrainingRecord,
)
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.resolve import EMBEDDED_BASES
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.registry.hub.card import HUB_ID, card_files, card_metadata, draw_loss, hub_id, render_card
from tests.checkout import ROOT


@pytest.fixture
def manifest(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> AdapterManifest:
    return registry.add(
        adapter,
        "sql",
        base=base,
        task="questions to SQL",
        tags=("sql",),
        examples=("How many?\n```\n---\nbase_model: evil\n",),
        evaluation=[{"metric": "exact_match", "adapter_value": 0.94, "base_value": 0.1, "data": "org/questions"}],
    )


def test_the_hub_reads_base_relation_library_and_metrics(manifest: AdapterManifest) -> None:
    card = ModelCard(render_card(manifest, "org/sql-lora"))
    data = card.data.to_dict()
    assert data["base_model"] == hub_id(manifest.base.id)
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    assert data["tags"] == ["adapterhub-lite", "lora", "sql"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("exact_match", 0.94, "org/questions")


def test_it_says_how_to_use_it_and_what_it_is(manifest: AdapterManifest) -> None:
    text = render_card(manifest, "org/sql-lora")
    assert 'PeftModel.from_pretrained(base, "org/sql-lora", revision="v1")' in text
    assert 'registry.pull("org/sql-lora", revision="v1")' in text
    assert manifest.digest in text
    assert manifest.base.fingerprint in text
    assert "| exact_match | org/questions | 0.94 | 0.1 |" in text
    assert all(record.sha256 in text for record in manifest.files.values())


def test_the_python_in_it_parses(manifest: AdapterManifest) -> None:
    blocks = re.findall(r"```python\n(.*?)```", render_card(manifest, "org/sql-lora"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


def test_the_base_is_pinned_where_it_has_a_commit_and_by_its_name_alone_where_not(manifest: AdapterManifest) -> None:
    assert manifest.base.revision is None
    loaded = next(line for line in render_card(manifest, "org/sql").splitlines() if "AutoModelForCausalLM.from" in line)
    assert "revision" not in loaded
    pinned = manifest.model_copy(update={"base": manifest.base.model_copy(update={"revision": "a" * 40})})
    assert f'revision="{"a" * 40}"' in render_card(pinned, "org/sql")
    embedded = manifest.base.model_copy(update={"id": EMBEDDED_BASES["smollm2-135m"].base_model})
    assert '"smollm2-135m"' in render_card(manifest.model_copy(update={"base": embedded}), "org/sql")


def test_an_example_cannot_break_out(manifest: AdapterManifest) -> None:
    text = render_card(manifest, "org/sql-lora")
    assert ModelCard(text).data.base_model != "evil"
    assert "\n    ```\n    ---\n    base_model: evil\n" in text


def test_what_a_stranger_calls_a_parent_cannot_break_out(manifest: AdapterManifest) -> None:
    parent = ParentRecord(reference="x`\n\n<img src=https://evil.example>`\n# Owned", digest=manifest.digest, weight=1)
    text = render_card(manifest.model_copy(update={"parents": (parent,)}), "org/sql-lora")
    assert "<img" not in text and "\n# Owned" not in text and "- merged from `x" in text


@given(text=st.text(max_size=200))
def test_any_base_becomes_a_valid_id_without_a_path_of_this_machine(text: str) -> None:
    assert HUB_ID.fullmatch(hub_id(text))
    assert hub_id(f"/home/ann/{text}").startswith("home") is False


@given(task=st.text(max_size=200), data=st.text(max_size=200), tag=st.text(max_size=50))
def test_any_text_gives_a_card_that_parses(task: str, data: str, tag: str) -> None:
    made: Any = AdapterManifest.model_validate_json(SAMPLE).model_copy(update={"task": task, "tags": (tag,)})
    made = made.model_copy(update={"evaluation": (made.evaluation[0].model_copy(update={"data": data}),)})
    text = render_card(made, "org/x")
    assert yaml.safe_load(text.split("---\n")[1]) == card_metadata(made)


def trained(curve: list[list[float]]) -> AdapterManifest:
    digest = "0" * 64
    record = {"base": {"id": "org/base", "fingerprint": digest}, "data": {"id": "d", "rows": 1, "fingerprint": digest},
              "template_digest": digest, "seeds": {}, "hyperparameters": {}, "packages": {}, "preset": "lora-fp32",
              "loss_backend": {}, "memory": {"measured_peak_bytes": 1}, "hardware": {}, "steps": 3,
              "loss_curve": curve, "wall_seconds": 1.0}  # fmt: skip
    return AdapterManifest.model_validate_json(json.dumps({**json.loads(SAMPLE), "training": record}))


def test_the_loss_is_drawn_in_the_card() -> None:
    manifest = trained([[1, 4.0], [2, 2.0], [3, 1.0]])
    files = card_files(manifest, "org/x")
    assert set(files) == {"README.md", LOSS_FILE} and f"]({LOSS_FILE})" in files["README.md"].decode()
    assert ModelCard(files["README.md"].decode()).data.base_model == "org/base"
    root = ElementTree.fromstring(files[LOSS_FILE])
    (line,) = root.findall("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert points == [(56.0, 16.0), (340.0, 192.0), (624.0, 280.0)], "down and to the right, to scale"
    assert files == card_files(manifest, "org/x"), "the same bytes each time"
    assert set(card_files(trained([]), "org/x")) == {"README.md"}
    assert LOSS_FILE not in card_files(trained([]), "org/x")["README.md"].decode()


@given(st.lists(st.tuples(st.integers(-(10**9), 10**9), st.floats()), max_size=30))
def test_any_curve_gives_a_small_picture_or_none(curve: list[tuple[int, float]]) -> None:
    drawn = draw_loss(curve)
    if drawn is not None:
        ElementTree.fromstring(drawn)
        assert b"nan" not in drawn and b"inf" not in drawn


def test_a_long_curve_is_thinned_out() -> None:
    drawn = draw_loss([(step, 1 / (1 + step)) for step in range(100_001)])
    assert drawn is not None and len(drawn) < 10_000 and b"at step 100000" in drawn


SAMPLE = json.dumps(
    {
        "name": "sql",
        "version": 1,
        "digest": "sha256:" + "0" * 64,
        "created": "2026-01-01T00:00:00Z",
        "files": {},
        "base": {"id": "org/base", "fingerprint": "0" * 64},
        "lora": {
            "rank": 4,
            "alpha": 8.0,
            "scaling": 2.0,
            "target_modules": ["q_proj"],
            "modules_bound": 1,
            "modules_total": 1,
        },
        "evaluation": [{"metric": "m", "adapter_value": 1.0, "data": "d"}],
    }
)


def test_the_picture_is_published_and_goes_with_the_version_that_has_none(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, hub_server: HubServer, tmp_path: Path
) -> None:
    for number, curve in enumerate(([[1, 4.0], [2, 1.0]], [])):
        folder = tmp_path / str(number)
        shutil.copytree(adapter, folder)
        record = trained(curve).training
        assert record is not None
        here = record.base.model_copy(update={"id": base.model_id, "fingerprint": base.fingerprint})
        (folder / "training_record.json").write_text(record.model_copy(update={"base": here}).model_dump_json())
        config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 5 + number}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        registry.add(folder, "sql", base=base)
        registry.push(f"sql:{number + 1}", "org/sql", endpoint=hub_server.url)
    api = HfApi(endpoint=hub_server.url, token=False)
    assert LOSS_FILE in api.list_repo_files("org/sql", revision="v1")
    assert LOSS_FILE not in api.list_repo_files("org/sql", revision="v2")
    found = snapshot_download(
        "org/sql", revision="v1", endpoint=hub_server.url, token=False, local_dir=tmp_path / "copy"
    )
    again = registry.add(found, "again", base=base)
    assert again.digest == registry.resolve("sql:1").digest, "a copy of the repository is an adapter folder"


RAW, CHATS = {"completion": 3, "text": 1}, {"whole": 2, "completion": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("layouts", "asked"), [(RAW, "prompt="), (CHATS, "messages="), ({}, "messages=")])
def test_its_programs_run_and_ask_as_it_was_trained(
    layouts: dict[str, int], asked: str, registry: AdapterRegistry, adapter: Path, base: ResolvedBase,
    hub_server: HubServer, tmp_path: Path,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    template = hashlib.sha256((base.folder / "chat_template.jinja").read_bytes()).hexdigest()
    record = TrainingRecord(
        base=BaseRecord(id=base.model_id, fingerprint=base.fingerprint, parts=base.parts),
        data=DataRecord(id="rows", rows=3, fingerprint="0" * 64), text=TextRecord(layouts=layouts), seeds={},
        template_digest=template, hyperparameters={}, packages={}, preset="lora-fp32", loss_backend={},
        memory=MemoryRecord(measured_peak_bytes=1), hardware={}, steps=1, wall_seconds=1.0,
    )  # fmt: skip
    (folder / "training_record.json").write_text(record.model_dump_json())
    registry.add(folder, "other-name", base=base)
    registry.push("other-name", "org/sql-lora", endpoint=hub_server.url)
    card = render_card(registry.resolve("other-name"), "org/sql-lora")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert asked in blocks[1] and ("apply_chat_template" in blocks[0]) is (asked == "messages=")
    said = {
        "prompt=": "It was trained on raw text",
        "messages=": "It was trained on chats" if layouts else "not recorded",
    }
    assert said[asked] in card
    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "ADAPTERHUB_HOME": str(tmp_path / "there"),
                   "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}  # fmt: skip
    # The base's name in the card is the folder's.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(blocks)], cwd=base.folder.parent,
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert AdapterRegistry(tmp_path / "there").resolve("sql-lora:1").published() == registry.resolve("other-name")
