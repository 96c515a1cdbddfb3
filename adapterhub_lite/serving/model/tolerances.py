"""How far logits that were computed in two ways may be apart, and how that is measured."""

import torch

from adapterhub_lite.errors import ConfigurationError

# A difference is the root mean square of it, over the tokens of a row, relative to that of the logits. float32 rounds to
# about 1e-6 of them.
TOLERANCE = 1e-4
# For what float32 cannot be asked: quantised layers, and bases that there is no memory to widen. On SmolLM2-135M in
# bfloat16, rounding gave 0.03 to 0.11 over four draws of prompts, a forgotten adapter 0.21 to 0.38, a wrong key or
# position 0.24 to 1.3.
TOLERANCE_16_BITS = 0.15


def check_within(tolerance: float, found: float) -> float:
    """Return `found`.

    Raises:
        ConfigurationError: it is more than rounding.
    """
    if not found <= tolerance:
        raise ConfigurationError(f"logits differ by {found:.2g} of their size, at most {tolerance:.2g} is rounding")
    return found


def relative_difference(found: torch.Tensor, own: torch.Tensor) -> float:
    """Root mean square of the difference over that of the model's logits, their mean left out; infinite for NaN."""
    scale = (own - own.mean()).square().mean().sqrt().clamp_min(1e-12)
    value = float((found - own).square().mean().sqrt() / scale)
    return value if value == value else float("inf")
