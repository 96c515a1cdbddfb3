"""States of rows that are not keys and values: convolution windows, state-space and linear-attention states.

Kept in transformers' own cache classes, so that a family's own code reads and writes them. Layout, for each state of each
layer: one tensor (rows, ...), one row per running request. A step of neighbouring rows is given their part of it, which
its layers update in place. Keys and values stay in `KVCache`, where the attention function looks for them.
"""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from adapterhub_lite.serving.model.packed_step import Run


class _KeysElsewhere(DynamicLayer):
    """A layer whose keys and values go to the attention function as they are."""

    length = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Keep nothing."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """As many as were computed before this step."""
        return self.length


class _StatesBesideKeys(_KeysElsewhere, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """The same for a layer that has states too."""

    def __init__(self, number_of_states: int) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)


STATES_AND_KEYS = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
# Where transformers keeps states of a fixed size.
STATE_CLASSES = {layer.__name__ for layer in (LinearAttentionLayer, *STATES_AND_KEYS)}


class RowStates:
    """The states of `rows` rows of a model, all layers."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self._config = model.config.get_text_config()
        self._rows = rows
        # (layer, which of its states, conv or recurrent) -> (rows, ...)
        self._stores: dict[tuple[int, int, str], torch.Tensor] = {}
        takes = inspect.signature(type(model).forward).parameters
        self.argument = "cache_params" if "cache_params" in takes else "past_key_values"

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' states; 0 before the first step."""
        return sum(store.nbytes for store in self._stores.values())

    def move(self, source: int, target: int) -> None:
        """Copy the states of row `source` to row `target`."""
        for store in self._stores.values():
            store[target].copy_(store[source])

    def of(self, run: Run) -> Cache:
        """What the model is called with for a run whose rows all begin, or all go on: their states."""
        cache = DynamicCache(config=self._config)
        layers: list[Any] = cache.layers  # which attributes one has depends on its class
        for index, layer in enumerate(layers):
            if isinstance(layer, STATES_AND_KEYS):
                layers[index] = _StatesBesideKeys(layer.number_of_states)
            elif isinstance(layer, DynamicLayer):
                layers[index] = _KeysElsewhere()
            layers[index].length = max(run.starts)
        if max(run.starts) > 0:
            for (index, state, name), store in self._stores.items():
                layer, part = layers[index], store[run.rows]
                getattr(layer, f"{name}_states")[state] = part
                getattr(layer, f"is_{name}_states_initialized")[state] = True
                layer.has_previous_state[state] = True
                layer.dtype, layer.device = part.dtype, part.device
                if name == "conv":
                    layer.conv_kernel_size[state] = part.shape[-1]
        return cache

    def keep(self, cache: Cache, run: Run) -> None:
        """Take over the states of rows that began; those of the others were updated in place."""
        if max(run.starts) > 0:
            return
        for index, layer in enumerate(cache.layers):
            for name in ("conv", "recurrent"):
                for state, value in getattr(layer, f"{name}_states", {}).items():
                    if value is not None:
                        store = self._stores.get((index, state, name))
                        if store is None:
                            store = self._stores[index, state, name] = value.new_zeros(self._rows, *value.shape[1:])
                        store[run.rows] = value
