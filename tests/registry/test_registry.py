"""The registry's daily life: add, resolve, aliases, roll-back, files, export."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import (
    AdapterRejectedError,
    AliasConflictError,
    IntegrityError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.registry import AdapterRegistry


def test_an_added_adapter_resolves_in_every_form(
    registry: AdapterRegistry, adapter: Path, other_adapter: Path, base: ResolvedBase
) -> None:
    first = registry.add(adapter, "sql", base=base, task="sql", tags=("b", "a", "a"), examples=("List all users.",))
    second = registry.add(other_adapter, "sql", base=base)
    registry.set_alias("sql", "prod", version=1)
    assert (first.version, second.version) == (1, 2)
    assert first.tags == ("a", "b")
    assert registry.resolve("sql") == second
    assert registry.resolve("sql:1") == registry.resolve("sql@prod") == registry.resolve(first.digest) == first
    assert [m.reference for m in registry.list()] == ["sql:1", "sql:2"]
    assert AdapterRegistry(registry.home).resolve("sql:1") == first


def test_the_record_says_what_was_bound(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> None:
    lora = registry.add(adapter, "sql", base=base).lora
    # q_proj, v_proj and up_proj in each of two layers
    assert (lora.modules_bound, lora.modules_total) == (6, 6)
    assert (lora.rank, lora.alpha, lora.scaling) == (4, 8.0, 2.0)
    assert lora.target_modules == ("q_proj", "up_proj", "v_proj")


def test_the_digest_follows_the_content_and_nothing_else(
    registry: AdapterRegistry, adapter: Path, other_adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    first = registry.add(adapter, "sql", base=base)
    again = AdapterRegistry(tmp_path / "elsewhere").add(adapter, "other-name", base=base, tags=("x",))
    assert again.digest == first.digest
    assert registry.add(other_adapter, "sql", base=base).digest != first.digest


def test_every_deciding_key_changes_the_digest(
    registry: AdapterRegistry, make_adapter: Any, base: ResolvedBase, tmp_path: Path
) -> None:
    import shutil

    source = make_adapter(seed=5)
    first = registry.add(source, "sql", base=base)
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    config["lora_alpha"] = 9
    (changed / "adapter_config.json").write_text(json.dumps(config))
    assert registry.add(changed, "sql", base=base).digest != first.digest


def test_unknown_references_name_the_nearest(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> None:
    with pytest.raises(UnknownNameError, match="none yet"):
        registry.resolve("sql")
    registry.add(adapter, "sql-lora", base=base)
    with pytest.raises(UnknownNameError, match="Did you mean 'sql-lora'"):
        registry.resolve("sql-lore")
    with pytest.raises(UnknownNameError, match="version"):
        registry.resolve("sql-lora:2")
    with pytest.raises(UnknownNameError, match="alias"):
        registry.resolve("sql-lora@prod")
    with pytest.raises(UnknownNameError, match="digest"):
        registry.resolve("sha256:" + "0" * 64)


def test_aliases_move_by_compare_and_swap(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> None:
    for _ in range(3):
        registry.add(adapter, "sql", base=base)
    registry.set_alias("sql", "prod", version=1, expect=0)
    with pytest.raises(AliasConflictError, match="expected at version none and is at 1"):
        registry.set_alias("sql", "prod", version=2, expect=0)
    registry.set_alias("sql", "prod", version=2, expect=1)
    with pytest.raises(AliasConflictError):
        registry.set_alias("sql", "prod", version=3, expect=1)
    assert registry.aliases("sql") == {"prod": 2}
    with pytest.raises(UnknownNameError):
        registry.set_alias("sql", "prod", version=9)
    with pytest.raises(UsageError):
        registry.set_alias("sql", "7", version=1)


def test_rollback_walks_back_and_history_keeps_all(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase
) -> None:
    for version in range(1, 5):
        registry.add(adapter, "sql", base=base)
        registry.set_alias("sql", "prod", version=version)
    assert registry.rollback("sql", "prod") == 3
    assert registry.rollback("sql", "prod") == 2
    registry.set_alias("sql", "prod", version=4)
    assert registry.rollback("sql", "prod") == 2
    assert registry.rollback("sql", "prod") == 1
    with pytest.raises(UsageError, match="no earlier version"):
        registry.rollback("sql", "prod")
    with pytest.raises(UnknownNameError):
        registry.rollback("sql", "staging")
    acts = [(move.act, move.previous, move.version) for move in registry.history("sql", "prod")]
    assert acts[:6] == [
        ("set", None, 1), ("set", 1, 2), ("set", 2, 3), ("set", 3, 4), ("rollback", 4, 3), ("rollback", 3, 2),
    ]  # fmt: skip
    registry.remove_alias("sql", "prod")
    assert registry.aliases("sql") == {}
    assert registry.history("sql")[-1].act == "drop"


def test_an_export_is_a_folder_that_plain_peft_loads(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    registry.add(adapter, "sql", base=base)
    folder = registry.export("sql", tmp_path / "out")
    ids = torch.arange(12)[None]
    answers = []
    for source in (adapter, folder):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), source)
        answers.append(model.eval()(input_ids=ids).logits)
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)
    with pytest.raises(UsageError, match="not empty"):
        registry.export("sql", folder)


def test_the_kept_configuration_names_no_local_path(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase
) -> None:
    manifest = registry.add(adapter, "sql", base=base)
    kept = json.loads(registry.file(manifest, "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == base.model_id
    assert str(base.folder.parent) not in json.dumps(kept) + manifest.to_bytes().decode()


def test_files_are_immutable_shared_and_missed(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> None:
    first = registry.add(adapter, "sql", base=base)
    second = registry.add(adapter, "copy", base=base)
    path = registry.file(first, "adapter_model.safetensors")
    assert path == registry.file(second, "adapter_model.safetensors")
    assert path.stat().st_mode & 0o222 == 0
    with pytest.raises(UnknownNameError):
        registry.file(first, "../registry.db")
    path.unlink()
    with pytest.raises(IntegrityError, match="missing or damaged"):
        registry.file(first, "adapter_model.safetensors")


def test_a_refused_adapter_leaves_nothing(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterRejectedError) as caught:
        registry.add(broken, "sql", base=base)
    assert any("kind 'IA3'; only LoRA" in problem for problem in caught.value.problems)
    assert registry.list() == []
    assert list(registry.store.objects) == []
    assert not any((registry.home / "staging").iterdir())


def test_who_asks_for_the_impossible_is_told(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> None:
    with pytest.raises(UsageError, match="no training record"):
        registry.add(adapter, "sql")
    with pytest.raises(UsageError, match="no adapter folder"):
        registry.add("/nowhere/at/all", "sql", base=base)
    with pytest.raises(UsageError, match="name of 1 to 64"):
        registry.add(adapter, "../sql", base=base)
    with pytest.raises(UsageError, match="evaluation wants"):
        registry.add(adapter, "sql", base=base, evaluation=[{"metric": "exact_match"}])
    with pytest.raises(UsageError, match="list of texts"):
        registry.add(adapter, "sql", base=base, tags="sql")


def test_registry_verbs_import_no_torch() -> None:
    code = (
        "import sys; from adapterhub_lite.registry import AdapterRegistry; r = AdapterRegistry(); r.list();"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'huggingface_hub', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
