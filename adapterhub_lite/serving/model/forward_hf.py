"""The packed forward pass in the model's own code of transformers, with each row's LoRA added to its linear layers.

For causal language models whose attention goes through transformers' attention interface, plain, 8-bit or 4-bit. It is
what the lean pass in `forward_llama` is held against. Hooks only: `close` leaves the model as it was.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.weights import Family
from adapterhub_lite.serving.model.batch import Step
from adapterhub_lite.serving.model.kv_cache import KVCache
from adapterhub_lite.serving.model.lora_torch import LoraBank

ATTENTION = "adapterhub_rows"


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    row_cache: KVCache | None = None,
    sliding_window: int | None = None,
    # Whatever else a family hands to its attention; what would change the result is refused below.
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the rows' own caches; query, key, value are (1, heads, T, head_dim), the result (1, T, heads, d)."""
    if row_cache is None:
        raise ConfigurationError("the attention of this base does not pass on what it is given")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ConfigurationError(f"the attention of this base uses {name}")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return row_cache.attend(layer, q, k, v, scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, rows_attention)


class HFForward:
    """Computes packed steps by calling `model` with an attention function of ours and hooks on its linear layers."""

    def __init__(self, model: PreTrainedModel, lora: LoraBank, cache: KVCache, families: tuple[Family, ...]) -> None:
        self._model, self._lora, self._cache = model, lora, cache
        self._tokens = 0
        self._attention: str = model.config._attn_implementation
        self._hooks = [
            model.get_submodule(path).register_forward_hook(self._adding(group, layer))
            for group, family in enumerate(families)
            for layer, path in enumerate(family.paths)
        ]
        model.set_attn_implementation(ATTENTION)

    def close(self) -> None:
        """Take hooks and attention function away."""
        for hook in self._hooks:
            hook.remove()
        self._model.set_attn_implementation(self._attention)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Nothing of its own: the model's tensors are where they were."""
        return {}

    def forward(self, step: Step) -> torch.Tensor:
        """Return the logits (rows that want them, vocabulary)."""
        self._tokens = step.token_ids.shape[0]
        out = self._model(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.last,
            row_cache=self._cache,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _adding(self, group: int, layer: int) -> Any:  # torch's own type of a hook
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            x = inputs[0].flatten(0, -2)
            if x.shape[0] != self._tokens:
                raise ConfigurationError(f"a linear layer is given {x.shape[0]} of the step's {self._tokens} tokens")
            self._lora.add(group, layer, x, y.view(-1, y.shape[-1]))

        return add
