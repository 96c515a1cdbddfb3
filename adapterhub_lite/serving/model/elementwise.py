"""What a layer computes between its products: norms with residuals, heads turned and stored, the gated activation.

In PyTorch, for any device; compiled/elementwise.h is the same in compiled code.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from adapterhub_lite.bases.layer_parts import Activation
from adapterhub_lite.serving.model.activations import ACTIVATIONS
from adapterhub_lite.serving.model.cache.kv_cache import Room


class Norm:
    """x / sqrt(mean(x^2) + epsilon) * weight (arXiv:1910.07467); `less_one` says that the weight given is 1 less."""

    def __init__(self, weight: torch.Tensor, epsilon: float, *, less_one: bool = False) -> None:
        weight = weight.detach()
        # For compiled code. 1 + weight has more digits than the weight's own dtype.
        self.exact = weight.float() + 1 if less_one else weight.float()
        self.epsilon = epsilon
        self._weight = self.exact if less_one else weight

    @property
    def width(self) -> int:
        """Over how many numbers the mean is."""
        return self.exact.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., width), normed, in its own dtype."""
        weight = self._weight
        return functional.rms_norm(x.to(weight.dtype), weight.shape, weight, self.epsilon).to(x.dtype)


@dataclass(frozen=True)
class Heads:
    """The heads of a layer's attention. The norms are of one head's width, or of all heads together."""

    query: int
    kv: int
    dim: int
    query_norm: Norm | None
    key_norm: Norm | None


@dataclass(frozen=True)
class Turn:
    """Cosines and sines (T, d) of rotary positions (arXiv:2104.09864), for the first d numbers of each head."""

    cos: torch.Tensor
    sin: torch.Tensor


class Elementwise:
    """What a layer computes between its products."""

    def add_and_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, after: Norm | None, factor: float, norm: Norm | None
    ) -> torch.Tensor:
        """x (T, width) += factor * after(delta) in place; return norm(x), or x itself without a norm."""
        if delta is not None:
            x.add_(delta if after is None else after(delta), alpha=factor)
        return x if norm is None else norm(x)

    def turn_and_store(self, qkv: torch.Tensor, heads: Heads, turn: Turn | None, room: Room) -> torch.Tensor:
        """Norm and turn queries and keys of qkv (T, heads, dim), put keys and values into their rooms; return queries."""
        turned = heads.query + heads.kv
        qk = qkv[:, :turned]
        if heads.query_norm is not None and heads.key_norm is not None:
            pairs = ((qk[:, : heads.query], heads.query_norm), (qk[:, heads.query :], heads.key_norm))
            qk = torch.cat([norm(part.reshape(-1, norm.width)).view_as(part) for part, norm in pairs], 1)
        if turn is not None:
            width = turn.cos.shape[-1]
            half, part = width // 2, qk[..., :width]
            # Signs in the sines: rotating a head is then a roll, a product and a product-sum. OLMo 2 has float32 turns.
            signed = torch.cat((-turn.sin[:, :half], turn.sin[:, half:]), -1)[:, None]
            part = torch.addcmul(part * turn.cos[:, None], part.roll(half, -1), signed).to(qk.dtype)
            qk = part if width == heads.dim else torch.cat((part, qk[..., width:]), -1)
        room.store(qk[:, heads.query :], qkv[:, turned:])
        return qk[:, : heads.query]

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """activation(gate) * up, from both side by side (T, 2 * width)."""
        gate, up = gate_up.chunk(2, -1)
        return ACTIVATIONS[activation](gate).mul_(up)
