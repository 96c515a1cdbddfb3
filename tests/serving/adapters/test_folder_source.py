"""A folder given to the engine passes the very check of `registry.add`, once for each state of its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import AdapterHubError, AdapterRejectedError, BaseMismatchError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest
from adapterhub_lite.serving.adapters.sources import FolderSource


@pytest.fixture
def folder(adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a sound adapter, to be changed."""
    return Path(shutil.copytree(adapters["wide"], tmp_path / "adapter"))


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"r": 0},
        {"r": 4},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"peft_type": "IA3"},
        {"target_modules": ["q_proj"]},
        {"lora_alpha": 1e6},
    ],
    ids=str,
)
def test_it_says_what_add_says(changes: dict[str, Any], folder: Path, tiny_base: Path, home: Path) -> None:
    set_config(folder, **changes)
    base = resolve_base(tiny_base)
    with pytest.raises(AdapterRejectedError) as by_add:
        AdapterRegistry(home).add(folder, "x", base=base)
    with pytest.raises(AdapterRejectedError) as by_engine:
        FolderSource(base).locate(folder)
    assert by_engine.value.problems == by_add.value.problems


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True}], ids=str)
def test_a_configuration_that_its_tensors_do_not_fit_is_refused(
    changes: dict[str, Any], folder: Path, tiny_base: Path
) -> None:
    set_config(folder, **changes)
    with pytest.raises(AdapterRejectedError):
        FolderSource(resolve_base(tiny_base)).locate(folder)


def test_a_record_of_another_base_is_noticed(folder: Path, tiny_base: Path) -> None:
    record = {
        "base": {"id": "org/other", "fingerprint": "f" * 64}, "data": {"id": "d", "rows": 1, "fingerprint": "0"},
        "template_digest": "0", "seeds": {}, "hyperparameters": {}, "packages": {}, "preset": "p", "loss_backend": {},
        "memory": {"measured_peak_bytes": 1}, "hardware": {}, "steps": 1, "wall_seconds": 1.0,
    }  # fmt: skip
    (folder / "training_record.json").write_text(json.dumps(record))
    with pytest.raises(BaseMismatchError, match="org/other"):
        FolderSource(resolve_base(tiny_base)).locate(folder)


def test_a_change_is_noticed_and_nothing_else_is_read_again(folder: Path, tiny_base: Path) -> None:
    source = FolderSource(resolve_base(tiny_base))
    files = source.locate(folder)
    assert source.locate(folder) is files
    set_config(folder, lora_alpha=16)
    again = source.locate(folder)
    assert again.digest != files.digest
    module = "model.layers.0.self_attn.q_proj"
    assert (files.scaling_of(module), again.scaling_of(module)) == (1.0, 2.0)
    set_config(folder, r=0)
    with pytest.raises(AdapterHubError):
        source.locate(folder)


def test_what_lies_beside_an_adapter_is_no_hindrance(folder: Path, tiny_base: Path, byte_tokenizer: Any) -> None:
    byte_tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"pickle")
    assert FolderSource(resolve_base(tiny_base)).locate(folder).name == "adapter"


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_pissa_is_a_plain_lora(
    tiny_base: Path, make_engine: Callable[..., Any], alone: Any, tmp_path: Path
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(
            r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
        ),
    )
    first = tmp_path / "first"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(first)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(first))
    engine = make_engine()
    with pytest.raises(AdapterRejectedError, match="convert it to a plain LoRA"):
        engine.generate(GenerationRequest(prompt="hi", adapter=tmp_path / "raw", max_new_tokens=4))
    answer = engine.generate(GenerationRequest(prompt="hi", adapter=tmp_path / "plain", max_new_tokens=4))
    assert answer.token_ids == alone.tokens("hi", tmp_path / "plain", new=4)
