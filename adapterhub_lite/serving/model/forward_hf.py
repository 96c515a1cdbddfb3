"""Forward passes in the model's own code of transformers, with each row's LoRA added to its linear layers.

Packed: all tokens of a step as one sequence, where keys and values are all that a base keeps. Stacked: rows that compute
as many tokens each as one batch, with their other states beside (`row_states`).

For causal language models whose attention goes through transformers' attention interface, plain, 8-bit or 4-bit. It is
what the lean pass in `forward_lean` is held against. Hooks only: `close` leaves the model as it was.
"""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.weights import Family
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.cache.row_states import RowStates
from adapterhub_lite.serving.model.lora.pairs_torch import LoraBank
from adapterhub_lite.serving.model.packed_step import RowSlice, Step, pack, unpack

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
    """Attend over the rows' own caches; query, key, value are (n, heads, T, head_dim), the result (n, T, heads, d)."""
    if options.get("position_bias") is not None:
        raise ConfigurationError("the attention of this base adds a bias by position")
    # The packed pass has one sequence, the stacked one a batch of them: tokens row by row in both.
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    # Not every family hands its attention what the model was called with.
    cache: KVCache = _now.cache
    out = cache.attend(layer, q, k, v, scaling, sliding_window, softcap=softcap, sinks=s_aux)
    return out.view(query.shape[0], -1, *out.shape[1:]), None


AttentionInterface.register(ATTENTION, rows_attention)


def batches(step: Step) -> Iterator[list[RowSlice]]:
    """The runs of a step, rows that begin apart from rows that go on."""
    slices = {part.row: part for part in unpack(step)}
    for run in step.runs:
        parts = [slices[row] for row in range(run.rows.start, run.rows.stop)]
        for _, own in itertools.groupby(parts, lambda part: part.start == 0):
            yield list(own)


class HFForward:
    """Computes steps by calling `model` with an attention function of ours and hooks on its linear layers.

    Packed without `states`, stacked with them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraBank | None,
        cache: KVCache,
        families: tuple[Family, ...],
        states: RowStates | None = None,
    ) -> None:
        self._model, self._lora, self._cache, self._states = model, lora, cache, states
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
        _now.cache = self._cache
        if self._states is not None:
            return torch.cat([self._stacked(part, self._states) for part in batches(step)])
        self._tokens = step.token_ids.shape[0]
        out = self._model(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.wanted,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _stacked(self, slices: list[RowSlice], states: RowStates) -> torch.Tensor:
        """The logits (tokens that want them, vocabulary) of neighbouring rows that compute as many tokens each."""
        own = pack(slices, self._cache.device)
        (run,) = own.runs
        ids = own.token_ids.view(run.count, run.query_length)
        self._tokens = ids.numel()
        if self._lora is not None:
            self._lora.begin(own)
        self._cache.begin(own)
        cache = states.of(run)
        out = self._model(
            input_ids=ids,
            position_ids=own.positions.view_as(ids),
            use_cache=True,
            logits_to_keep=max(own.counts),
            **{states.argument: cache},
        )
        states.keep(cache, run)
        return torch.cat([logits[-count:] for logits, count in zip(out.logits, own.counts, strict=True)])

    def _adding(self, group: int, layer: int) -> Any:  # torch's own type of a hook
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            x = inputs[0].flatten(0, -2)
            if x.shape[0] != self._tokens:
                raise ConfigurationError(f"a linear layer is given {x.shape[0]} of the step's {self._tokens} tokens")
            assert self._lora is not None
            # Mamba's are given what was transposed.
            self._lora.add(group, layer, x if x.stride(1) == 1 else x.contiguous(), y.view(-1, y.shape[-1]))

        return add
