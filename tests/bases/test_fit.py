"""What a registry keeps of an adapter for a base, an engine of that base loads."""

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.bases.fit import base_modules, inspect_adapter
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.serving import InferenceEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_registry_and_the_engine_take_the_same_modules(
    kind: str, byte_tokenizer: "PreTrainedTokenizerFast", tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **KINDS[kind],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")
    base = resolve_base(tmp_path / "base")
    modules = defaultdict(dict)
    for name, shape in base_modules(base.folder).items():
        modules[name.rpartition(".")[2]][name] = shape
    verdicts = {}
    with InferenceEngine.from_base(tmp_path / "base", device="cpu", max_rows=2) as engine:
        for last, places in modules.items():
            folder = tmp_path / last
            folder.mkdir()
            halves = {"A": lambda shape: (2, shape[1]), "B": lambda shape: (shape[0], 2)}
            tensors = {
                f"base_model.model.{name}.lora_{half}.weight": torch.randn(size(shape))
                for name, shape in places.items()
                for half, size in halves.items()
            }
            save_file(tensors, folder / "adapter_model.safetensors")
            settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
            (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": [last]}))
            kept = not inspect_adapter(folder, base=base).problems
            try:
                loaded = bool(engine.load(folder))
            except AdapterHubError:
                loaded = False
            verdicts[last] = kept, loaded
    assert verdicts == {last: (loaded, loaded) for last, (_, loaded) in verdicts.items()}
    assert any(loaded for _, loaded in verdicts.values()) and not all(loaded for _, loaded in verdicts.values())
