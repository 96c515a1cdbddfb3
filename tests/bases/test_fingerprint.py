"""The fingerprint covers what decides answers, all of it and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.bases import base_fingerprint
from adapterhub_lite.bases.fingerprint import read_fingerprint
from adapterhub_lite.errors import UsageError

PARTS = {"weight": "weights", "dtype": "weights"}


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "copy", ignore=shutil.ignore_patterns(".fingerprint.json"))
    return tmp_path / "copy"


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_copy_has_the_same_fingerprint(tiny_base: Path, copy: Path) -> None:
    assert base_fingerprint(copy) == base_fingerprint(tiny_base)


def test_who_wrote_it_and_the_order_of_tensors_do_not_matter(tiny_base: Path, copy: Path) -> None:
    rewrite_config(copy, transformers_version="0.0.0", _name_or_path="/home/somebody")
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors, reverse=True)
    (copy / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:3]}, copy / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, copy / "model-2.safetensors")
    assert base_fingerprint(copy) == base_fingerprint(tiny_base)


@pytest.mark.parametrize("part", ["weight", "dtype", "config", "tokenizer", "template"])
def test_every_part_that_decides_answers_changes_it(tiny_base: Path, copy: Path, part: str) -> None:
    if part in ("weight", "dtype"):
        tensors = load_file(copy / "model.safetensors")
        name = sorted(tensors)[0]
        changed = tensors[name].to(torch.bfloat16) if part == "dtype" else tensors[name].clone()
        if part == "weight":
            changed.view(-1)[0] += 1e-3
        save_file({**tensors, name: changed}, copy / "model.safetensors")
    elif part == "config":
        rewrite_config(copy, rms_norm_eps=1e-3)
    else:
        name = "tokenizer.json" if part == "tokenizer" else "chat_template.jinja"
        (copy / name).write_text((copy / name).read_text() + " ")
    assert base_fingerprint(copy) != base_fingerprint(tiny_base)
    before, after = read_fingerprint(tiny_base).parts, read_fingerprint(copy).parts
    assert [name for name in before if before[name] != after[name]] == [PARTS.get(part, part)]


def test_the_memo_is_not_trusted_after_a_change(copy: Path) -> None:
    before = base_fingerprint(copy)
    assert (copy / ".fingerprint.json").exists()
    rewrite_config(copy, rms_norm_eps=1e-3)
    assert base_fingerprint(copy) != before


def test_a_folder_without_a_base_and_a_truncated_base_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a base model: expected config\.json"):
        base_fingerprint(tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="truncated"):
        base_fingerprint(copy)
