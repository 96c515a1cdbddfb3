"""Adapters whose beginning changed the base (PiSSA, arXiv:2404.02948), written so that the untouched base can use them.

PiSSA moves the largest singular directions W0 = s B0 A0 out of W into the adapter. What was learned is the difference
s (B A - B0 A0), which is a plain LoRA of twice the rank: [B, -B0] [A; A0].
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterhub_lite.errors import ConfigurationError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def changes_the_base(config: PeftConfig) -> bool:
    """Whether an adapter of this configuration takes part of the base's weights into itself when it is made."""
    return str(getattr(config, "init_lora_weights", "")).startswith("pissa")


def write_plain(folder: Path, initial: Mapping[str, Tensor]) -> None:
    """Rewrite the adapter in `folder`, which began as `initial` (names as in the file), for the untouched base.

    Raises:
        ConfigurationError: it has ranks of its own by module, or a DoRA, which cannot be subtracted.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_dora"):
        raise ConfigurationError("A PiSSA adapter with DoRA or ranks by module cannot be written for the plain base.")
    written: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        before = initial[name].to(tensor)
        in_a = ".lora_A." in name
        written[name] = torch.cat([tensor, before if in_a else -before], dim=0 if in_a else 1).contiguous()
    save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
    # The scaling stays: alpha / r, or alpha / sqrt(r) for rsLoRA.
    config["lora_alpha"] *= 2**0.5 if config.get("use_rslora") else 2
    config["r"], config["init_lora_weights"] = 2 * config["r"], True
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
