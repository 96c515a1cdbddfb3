"""LoRA adapters of llama.cpp (GGUF), written as PEFT writes them. Run in a child process: see `child`.

llama.cpp keeps alpha and scales by alpha / rank as PEFT does. Its tensors carry GGUF's short names, and its converter
reorders the rows of q_proj and k_proj of Llama models (`permute` in convert_hf_to_gguf.py), which is undone here.
"""

import json
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.changes import LORA_A, LORA_B, tensor_name
from adapterhub_lite.adapter_format.strict_reading import MAX_BASE_HEADER_BYTES, read_tensor_entries

MAX_TENSORS = 20_000
# The architectures that are converted; of these, the converter reorders rows of q_proj and k_proj in PERMUTED.
PERMUTED = frozenset({"llama", "granite"})
CONVERTED = PERMUTED | {"qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"}


def from_gguf(source: Path, target: Path, config_target: Path, base: Path) -> str:
    """Write the LoRA in `source` to `target` and its configuration to `config_target`, for the base in folder `base`.

    Raises:
        ValueError: it is no LoRA, or one whose tensors have no place in the base.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    if _text(reader, "general.type") != "adapter" or _text(reader, "adapter.type") != "lora":
        raise ValueError("it is a GGUF file but no LoRA adapter")
    if len(reader.tensors) > MAX_TENSORS:
        raise ValueError(f"it has {len(reader.tensors)} tensors, at most {MAX_TENSORS} are read")
    architecture, alpha = _text(reader, "general.architecture"), float(reader.fields["adapter.lora.alpha"].contents())
    if architecture not in CONVERTED:
        raise ValueError(f"it is for {architecture!r:.40}; converted are {', '.join(sorted(CONVERTED))}")
    settings = json.loads((base / "config.json").read_bytes())
    modules = _modules(architecture, int(settings["num_hidden_layers"]), base)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for tensor in reader.tensors:
        short, _, part = tensor.name.rpartition(".lora_")
        module = modules.get(short.removesuffix(".weight"))
        if module is None or part not in ("a", "b"):
            raise ValueError(f"its tensor {tensor.name!r:.80} has no place in a {architecture} model")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if part == "b" and architecture in PERMUTED and module.endswith(("q_proj", "k_proj")):
            heads = settings["num_attention_heads"]
            value = _unpermute(
                value, heads if module.endswith("q_proj") else settings.get("num_key_value_heads", heads)
            )
        tensors[tensor_name(module, LORA_A if part == "a" else LORA_B)] = value.contiguous()
        if part == "a":
            ranks[module] = value.shape[0]
    if not ranks:
        raise ValueError("it holds no LoRA tensors")
    rank = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
    }
    save_file(tensors, target, metadata={"format": "pt"})
    config_target.write_text(json.dumps(config))
    return f"converted from GGUF ({architecture}, {len(ranks)} modules)"


def _text(reader: Any, key: str) -> str | None:
    field = reader.fields.get(key)
    value = None if field is None else field.contents()
    return value if isinstance(value, str) else None


def _modules(architecture: str, layers: int, base: Path) -> dict[str, str]:
    """GGUF's short name -> the module of the base in folder `base` that it stands for."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    there = {
        entry.name.removesuffix(".weight")
        for path in base.glob("*.safetensors")
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES)
    }
    # One short name stands for the names that many libraries have; the base has one of them.
    mapping = get_tensor_name_map(kind, layers).mapping
    return {short: name for name, (_, short) in mapping.items() if name in there}


def _unpermute(rows: Any, heads: int) -> Any:
    """Undo LlamaModel.permute: rows lie as (heads, 2, half) in transformers and (heads, half, 2) in GGUF."""
    out, rank = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, rank).swapaxes(1, 2).reshape(out, rank)
