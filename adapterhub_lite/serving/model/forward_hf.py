"""The plain forward pass: the model's own code of transformers, with the lora put around its linear layers.

For any causal language model whose attention goes through transformers' attention interface, plain, 8-bit or 4-bit.
It is what the lean pass in `fused` is held against.
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


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    row_cache: KVCache | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the rows' own caches; query, key, value are (1, heads, T, head_dim), the result (1, T, heads, d)."""
    assert row_cache is not None, "the model was called around the runner"
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ConfigurationError("This base caps its attention scores or adds sinks, which the engine cannot serve.")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return row_cache.attend(layer, q, k, v, scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)


class BankLinear(nn.Module):
    """A frozen linear layer of any kind with the lora's delta added; (1, T, in) -> (1, T, out)."""

    def __init__(self, inner: nn.Module, lora: LoraBank, group: int, layer: int) -> None:
        super().__init__()
        self.inner, self._lora, self._group, self._layer = inner, lora, group, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        self._lora.add(self._group, self._layer, x.flatten(0, -2), y.view(-1, y.shape[-1]))
        return y


class HFForward:
    """Computes steps by calling `model`, whose linear layers and attention function it puts its own around."""

    def __init__(
        self, model: PreTrainedModel, lora: LoraBank, cache: KVCache, groups: tuple[tuple[Family, ...], ...]
    ) -> None:
        self._model, self._cache = model, cache
        for number, (family,) in enumerate(groups):
            for layer, path in enumerate(family.paths):
                model.set_submodule(path, BankLinear(model.get_submodule(path), lora, number, layer))
        model.set_attn_implementation(ATTENTION)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Nothing of its own: the model's tensors are where they were."""
        return {}

    def forward(self, step: Step) -> torch.Tensor:
        """Return the logits (rows that want them, vocabulary)."""
        out = self._model(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.last,
            row_cache=self._cache,
        )
        logits: torch.Tensor = out.logits[0]
        return logits
