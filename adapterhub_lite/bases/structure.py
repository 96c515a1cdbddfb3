"""What the model of a base consists of by transformers' own names, which its files may call otherwise.

A model is built from its configuration without memory for weights; torch and transformers are imported on use.
"""

import copy
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.changes import Structure
from adapterhub_lite.bases.broken import read_by_transformers
from adapterhub_lite.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def structure_in(folder: Path) -> Structure:
    """The structure of the base in `folder`, from its configuration alone."""
    content = (folder / "config.json").read_text()
    return _built(str(folder), content)


@lru_cache(maxsize=8)
def _built(folder: str, _content: str) -> Structure:
    from transformers import AutoConfig

    with read_by_transformers("configuration", folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return structure_for(config)


def structure_for(config: Any) -> Structure:  # a config of transformers: its fields differ by family
    """The structure of the causal language model that `config` describes.

    Raises:
        ConfigurationError: it describes another kind of model.
        BrokenBaseError: no model can be built from it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_causal(config)
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        # Packed weights have other shapes than what they stand for.
        del config.quantization_config
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with read_by_transformers("configuration", config.name_or_path):
            model = AutoModelForCausalLM.from_config(config)
        return structure_of(model)


def check_causal(config: Any) -> None:  # a config of transformers
    """Refuse what describes no causal language model.

    Raises:
        ConfigurationError: it does not.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigurationError(
            f"{type(config).__name__} describes no causal language model, and those are what is trained and served here. "
            "Use transformers' own Trainer for others."
        )


def structure_of(model: "PreTrainedModel") -> Structure:
    """The structure of a model in memory, as it was before PEFT wrapped its layers or bitsandbytes packed them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    parameters: dict[str, tuple[int, ...]] = {}
    embeddings, linear, transposed = set(), set(), set()
    for name, module in model.named_modules():
        own = {f"{name}.{key}" if name else key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Linear):
            if takes_lora(name, module):
                linear.add(name)
            own = {key: _dense(module, key, shape) for key, shape in own.items()}
        elif isinstance(module, Conv1D):
            linear.add(name)
            transposed.add(name)
        elif isinstance(module, nn.Embedding):
            embeddings.add(name)
        elif getattr(module, "is_transposed", False):
            transposed.add(name)
        parameters |= own
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    return Structure(
        parameters,
        embeddings=frozenset(embeddings),
        linear=frozenset(linear),
        transposed=frozenset(transposed),
        embedding=names.get(id(embedding)),
        head=None if head is None else names.get(id(head)),
        tied=tied,
    )


# Mamba, Falcon-Mamba and Jamba multiply by the weight of this layer without calling it: PEFT's LoRA on it has no effect.
ONLY_READ = frozenset({"dt_proj"})


def takes_lora(name: str, module: "nn.Linear") -> bool:
    """Whether a pair on this linear layer is added to what the model computes: it is called, and gives a product."""
    return name.rpartition(".")[2] not in ONLY_READ and is_product(module)


def is_product(module: "nn.Linear") -> bool:
    """Whether the module computes x W^T + b: some derive from `nn.Linear` and return a choice of experts with it.

    Of a module without values, whether it returns what has the shape of that.
    """
    import torch

    own = torch.nn.Linear.forward
    if type(module).forward is own or type(module).__module__.startswith("bitsandbytes."):
        return True
    probe = torch.ones(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            out = module(probe)
    except Exception:  # whatever a family's own forward wants besides
        return False
    plain = torch.nn.functional.linear(probe, module.weight, module.bias)
    if not isinstance(out, torch.Tensor) or out.shape != plain.shape:
        return False
    return out.device.type == "meta" or torch.allclose(out, plain)


def _dense(module: "nn.Linear", name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (module.out_features, module.in_features) if name.endswith(".weight") else shape


def token_bytes(config: "PretrainedConfig", dtype: "torch.dtype") -> int:
    """Bytes that the keys and values of one token take in all layers, as far as a configuration says."""
    layers = getattr(config, "per_layer_config", None)
    if layers is not None:  # heads differ from layer to layer
        return sum(_layer_bytes(layer, dtype) for layer in layers)
    return _layer_bytes(config, dtype) * int(config.num_hidden_layers)


def _layer_bytes(config: "PretrainedConfig", dtype: "torch.dtype") -> int:
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * int(kv_heads) * int(head_dim) * dtype.itemsize
