"""The states that go into the output head, taken from an ordinary forward pass of the whole model.

The pass goes through the outermost wrapper, so that DDP and the like see it; the head is run on no position at all.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_lite.errors import ConfigurationError


class HiddenStates:
    """Runs a causal language model and returns the hidden states (batch, seq, D) after its final norm.

    Raises:
        ConfigurationError: the model has no output head, or no decoder of its own to listen to.
    """

    def __init__(self, model: Any) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        if head is None or decoder is None or decoder is inner:
            raise ConfigurationError(
                f"{type(inner).__name__} has no output head over a decoder. Load the base with AutoModelForCausalLM."
            )
        takes_positions = "logits_to_keep" in inspect.signature(inner.forward).parameters
        # No position at all: with one, a batch's slice makes matmul copy the whole head once a row.
        self._short = {"logits_to_keep": torch.empty(0, dtype=torch.long)} if takes_positions else {}
        self._seen: Tensor | None = None
        decoder.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen = output[0]

    def of(self, model: nn.Module, inputs: dict[str, Any], *, logits: bool = False) -> tuple[Tensor, Any]:
        """Run `model`, however it is wrapped, on `inputs`; return (hidden states, the model's own output).

        The output's logits are empty, where the model can leave them out and they are not asked for."""
        output = model(**({} if logits else self._short), **inputs)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen, output
