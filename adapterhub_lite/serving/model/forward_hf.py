"""The packed forward pass in the model's own code of transformers, with each row's LoRA added to its linear layers.

For causal language models whose attention goes through transformers' attention interface, plain, 8-bit or 4-bit. It is
what the lean pass in `forward_llama` is held against. Hooks only: `close` leaves the model as it was.
"""

import threading
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.weights import Family
from adapterhub_lite.serving.model.kv_cache import KVCache, Step
from adapterhub_lite.serving.model.lora_torch import LoraBank

ATTENTION = "adapterhub_rows"
# The cache of the step that this thread computes.
_now = threading.local()


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    # Whatever else a family hands to its attention; what would change the result is refused below.
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the rows' own caches; query, key, value are (1, heads, T, head_dim), the result (1, T, heads, d)."""
    if options.get("position_bias") is not None:
        raise ConfigurationError("the attention of this base adds a bias by position")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    # Not every family hands its attention what the model was called with.
    cache: KVCache = _now.cache
    return cache.attend(layer, q, k, v, scaling, sliding_window, softcap=softcap, sinks=s_aux)[None], None


AttentionInterface.register(ATTENTION, rows_attention)


class HFForward:
    """Computes packed steps by calling `model` with an attention function of ours and hooks on its linear layers."""

    def __init__(
        self, model: PreTrainedModel, lora: LoraBank | None, cache: KVCache, families: tuple[Family, ...]
    ) -> None:
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
        """Return the logits (tokens that want them, vocabulary)."""
        self._tokens = step.token_ids.shape[0]
        _now.cache = self._cache
        out = self._model(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.wanted,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _adding(self, group: int, layer: int) -> Any:  # torch's own type of a hook
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            x = inputs[0].flatten(0, -2)
            if x.shape[0] != self._tokens:
                raise ConfigurationError(f"a linear layer is given {x.shape[0]} of the step's {self._tokens} tokens")
            assert self._lora is not None
            self._lora.add(group, layer, x, y.view(-1, y.shape[-1]))

        return add
