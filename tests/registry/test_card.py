"""The card is made from the manifest, and valid whatever stands in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.registry.card import HUB_ID, card_metadata, hub_id, render_card


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


def test_an_example_cannot_break_out(manifest: AdapterManifest) -> None:
    text = render_card(manifest, "org/sql-lora")
    assert ModelCard(text).data.base_model != "evil"
    assert "\n    ```\n    ---\n    base_model: evil\n" in text


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
