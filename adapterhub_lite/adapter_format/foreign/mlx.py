"""Adapters of MLX (mlx-lm's `adapters.safetensors`), written as PEFT writes them. Torch on use.

mlx-lm computes y = W x + scale * (x @ lora_a) @ lora_b, with lora_a (in, rank) and lora_b (rank, out); PEFT's A and B
are their transposes, and alpha = scale * rank. A DoRA's magnitude `m` is PEFT's. Source: mlx_lm/tuner/lora.py, dora.py.
"""

import json
import re
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.binding import TAKEN_DTYPES
from adapterhub_lite.adapter_format.changes import DORA_MAGNITUDE, LORA_A, LORA_B, tensor_name
from adapterhub_lite.adapter_format.lora_config import MAX_CONFIG_BYTES
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapterhub_lite.adapter_format.strict_reading import read_tensor_entries, strict_json
from adapterhub_lite.errors import AdapterRejectedError

MLX_WEIGHTS = "adapters.safetensors"
NAME = re.compile(r"(?P<module>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30})\.(?P<part>lora_a|lora_b|m)")
PARTS = {"lora_a": LORA_A, "lora_b": LORA_B, "m": DORA_MAGNITUDE}


def is_mlx(folder: Path) -> bool:
    """Whether `folder` holds an adapter of mlx-lm and none of PEFT."""
    path = folder / MLX_WEIGHTS
    return path.is_file() and not path.is_symlink() and not (folder / WEIGHTS_FILE).exists()


def convert_mlx(subject: str, folder: Path, target: Path) -> str:
    """Write the MLX adapter in `folder` as PEFT's two files into `target`; returns what to say of it.

    Raises:
        AdapterRejectedError: it is no LoRA or DoRA of MLX, or is broken.
    """
    try:
        entries = read_tensor_entries(folder / MLX_WEIGHTS)
        found = strict_json((folder / CONFIG_FILE).read_bytes(), what=CONFIG_FILE, limit=MAX_CONFIG_BYTES)
        kind, scale, dropout = _settings(found)
    except (OSError, ValueError) as error:
        raise AdapterRejectedError(subject, [f"it is no adapter of MLX: {error}"]) from None
    strange = [e.name for e in entries if not NAME.fullmatch(e.name) or e.dtype not in TAKEN_DTYPES]
    ranks = {e.name.rpartition(".")[0]: e.shape[1] for e in entries if e.name.endswith(".lora_a") and len(e.shape) == 2}
    if strange or not ranks or kind not in ("lora", "dora"):
        shown = f"its tensors include {strange[0]:.80}" if strange else f"its fine_tune_type is {kind!r:.40}"
        raise AdapterRejectedError(subject, [f"only a LoRA or DoRA of MLX can be converted; {shown}"])
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(folder / MLX_WEIGHTS, framework="pt") as file:
        for entry in entries:
            module, _, part = entry.name.rpartition(".")
            tensor = file.get_tensor(entry.name)
            tensors[tensor_name(module, PARTS[part])] = tensor if part == "m" else tensor.T.contiguous()
    target.mkdir(exist_ok=True)
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    rank = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": found.get("model") if isinstance(found.get("model"), str) else None,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "target_modules": sorted(ranks),
        "use_dora": kind == "dora",
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: scale * own for module, own in ranks.items() if own != rank},
    }
    (target / CONFIG_FILE).write_text(json.dumps(config))
    return f"converted from MLX ({kind}, scale {scale:g})"


def _settings(found: dict[str, Any]) -> tuple[str, float, float]:
    """Kind, scale and dropout of an adapter_config.json of mlx-lm."""
    settings = found.get("lora_parameters", found)
    if not isinstance(settings, dict):
        raise ValueError("lora_parameters is no object")
    scale, dropout = settings.get("scale", 20.0), settings.get("dropout", 0.0)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (scale, dropout)):
        raise ValueError("scale or dropout is no number")
    kind = found.get("fine_tune_type", "dora" if found.get("use_dora") else "lora")
    return str(kind), float(scale), min(max(float(dropout), 0.0), 0.99)
