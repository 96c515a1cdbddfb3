"""The activations that the lean passes compute, by the names that `bases/layer_parts` gives them."""

from collections.abc import Callable

import torch
from torch.nn import functional

from adapterhub_lite.bases.layer_parts import Activation

# For the compiled code: x * sigmoid(factor * (x + cubic * x^3)). silu, and the tanh form of gelu, whose tanh is
# 2 sigmoid(2 z) - 1 for z = sqrt(2 / pi) (x + 0.044715 x^3), arXiv:1606.08415.
SIGMOID_FORMS: dict[Activation, tuple[float, float]] = {"silu": (1.0, 0.0), "gelu_tanh": (1.5957691216057308, 0.044715)}
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
