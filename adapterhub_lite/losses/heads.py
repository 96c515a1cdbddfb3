"""The output head of a causal language model, read at call time. Knows torch and duck typing; never imports peft."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapterhub_lite.errors import ConfigurationError


@dataclass(frozen=True)
class Head:
    """Where the logits of a model come from. `weight` and `bias` are read when asked, so that a swap is seen."""

    module: nn.Module
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def weight(self) -> Tensor:
        """The (V, D) weight of the head as it is now."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The (V,) bias, or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None


def head_of(model: Any) -> Head:
    """Find the output head of a causal language model (a PEFT wrapper is seen through).

    Raises:
        ConfigurationError: the model has no output head.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ConfigurationError(f"{type(model).__name__} has no output embeddings: a causal language model is needed.")
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(module, softcap=softcap)
