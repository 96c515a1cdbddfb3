"""Probes are reproduced in a fresh process, and notices what checksums of an adapter cannot."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapterhub_lite.adapter_format.probes import replay_probes, write_probes
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError

REPLAY = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
from adapterhub_lite.adapter_format.probes import replay_probes
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
result = replay_probes(model, sys.argv[2])
print(result.max_abs_difference, result.passed)
"""


def _adapted(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


@pytest.fixture
def with_probes(make_adapter: Callable[..., Path], tiny_base: Path, byte_tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(make_adapter(seed=3), folder)
    write_probes(_adapted(tiny_base, folder), byte_tokenizer, folder)
    return folder


def test_a_fresh_process_reproduces_the_probes(with_probes: Path, tiny_base: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", REPLAY, str(tiny_base), str(with_probes)]
    done = subprocess.run(command, capture_output=True, text=True)
    difference, passed = done.stdout.split()
    assert passed == "True", done.stderr
    torch.testing.assert_close(torch.tensor(float(difference)), torch.tensor(0.0))


def test_the_model_is_left_in_its_mode(with_probes: Path, tiny_base: Path) -> None:
    model = _adapted(tiny_base, with_probes).train()
    assert replay_probes(model, with_probes).passed
    assert model.training


def test_dropout_is_off_while_the_probes_are_asked(
    make_adapter: Callable[..., Path], tiny_base: Path, byte_tokenizer: Any, tmp_path: Path
) -> None:
    from adapterhub_lite.bases import load_base_model

    folder = tmp_path / "adapter"
    shutil.copytree(make_adapter(seed=3, lora_dropout=0.5), folder)
    model = PeftModel.from_pretrained(load_base_model(tiny_base), folder, is_trainable=True).train()
    write_probes(model, byte_tokenizer, folder)
    assert replay_probes(model, folder).max_abs_difference == 0.0
    assert model.training


def _wrong_alpha(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def _rslora(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))


def _renamed_module(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    tensors = {}
    for name, tensor in load_file(path).items():
        layer = next(part for part in swap if part in name)
        tensors[name.replace(layer, swap[layer])] = tensor
    save_file(tensors, path)


def _zeroed(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)


def _moved_base(adapter: Path, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(0)
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.02 * torch.randn_like(
        tensors["model.layers.0.mlp.up_proj.weight"]
    )
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _coarser_base(adapter: Path, base: Path) -> None:
    # Round-to-nearest on 16 levels a row: what a 4-bit load does to the weights.
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            step = tensor.abs().amax(1, keepdim=True) / 7
            tensors[name] = (tensor / step).round() * step
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


CHANGES = [_wrong_alpha, _rslora, _renamed_module, _zeroed, _moved_base, _coarser_base]
# What bf16 rounds away in a replay, it cannot notice: moving one matrix by two percent is that small.
CASES = [
    (change, dtype)
    for change in CHANGES
    for dtype in (torch.float32, torch.bfloat16)
    if (change, dtype) != (_moved_base, torch.bfloat16)
]


@pytest.mark.parametrize(("change", "dtype"), CASES)
def test_a_change_is_caught_by_behaviour(
    change: Callable[[Path, Path], None], dtype: torch.dtype, with_probes: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    assert replay_probes(_adapted(base, with_probes, dtype), with_probes).passed
    change(with_probes, base)
    result = replay_probes(_adapted(base, with_probes, dtype), with_probes)
    assert not result.passed, result


def test_what_holds_no_probes_is_refused(with_probes: Path, tiny_base: Path) -> None:
    model = _adapted(tiny_base, with_probes)
    path = with_probes / "probes.safetensors"
    good = load_file(path)
    metadata = {"format": "adapterhub-probes-1", "dtype": "float32"}
    bad = {
        "lengths": torch.full_like(good["lengths"], 10_000),
        "tokens": good["tokens"] - 300,
        "top_ids": good["top_ids"] + 100_000,
        "top_logits": good["top_logits"][:, :2].contiguous(),
    }
    for name, tensor in bad.items():
        save_file({**good, name: tensor}, path, metadata=metadata)
        with pytest.raises(IntegrityError):
            replay_probes(model, path)
    save_file(good, path)
    with pytest.raises(IntegrityError, match="format"):
        replay_probes(model, path)
    path.unlink()
    with pytest.raises(IntegrityError, match="could not be read"):
        replay_probes(model, path)


def test_nan_answers_are_neither_written_nor_passed(with_probes: Path, tiny_base: Path, byte_tokenizer: Any) -> None:
    model = _adapted(tiny_base, with_probes)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    assert not replay_probes(model, with_probes).passed
    with pytest.raises(AdapterRejectedError, match="NaN"):
        write_probes(model, byte_tokenizer, with_probes)
