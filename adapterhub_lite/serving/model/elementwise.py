"""What a layer computes between its products: norms with residuals, heads turned and stored, the gated activation.

In PyTorch for any device, and in compiled code for a CPU (row_elementwise.c), which makes one pass over the numbers where
PyTorch makes several, in float32 and rounded once. Both are interchangeable; the first is what the second is held against.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from adapterhub_lite.serving.model.kv_cache import Room
from adapterhub_lite.serving.model.lora.pairs_native import KINDS

# Of the compiled code: x * sigmoid(factor * (x + cubic * x^3)). silu, and the tanh form of gelu, whose tanh is
# 2 sigmoid(2 z) - 1 for z = sqrt(2 / pi) (x + 0.044715 x^3), arXiv:1606.08415.
SIGMOID_FORMS = {"silu": (1.0, 0.0), "gelu_tanh": (1.5957691216057308, 0.044715)}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


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


class Elementwise(Protocol):
    """What a layer computes between its products."""

    # What `Turn` is to be in.
    turn_dtype: torch.dtype

    def add_and_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, after: Norm | None, factor: float, norm: Norm | None
    ) -> torch.Tensor:
        """x (T, width) += factor * after(delta) in place; return norm(x), or x itself without a norm."""
        ...

    def turn_and_store(self, qkv: torch.Tensor, heads: Heads, turn: Turn | None, room: Room) -> torch.Tensor:
        """Norm and turn queries and keys of qkv (T, heads, dim), put keys and values into their rooms; return queries."""
        ...

    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(gate) * up, from both side by side (T, 2 * width)."""
        ...


class TorchElementwise:
    """In PyTorch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.turn_dtype = dtype

    def add_and_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, after: Norm | None, factor: float, norm: Norm | None
    ) -> torch.Tensor:
        """As the protocol says."""
        if delta is not None:
            x.add_(delta if after is None else after(delta), alpha=factor)
        return x if norm is None else norm(x)

    def turn_and_store(self, qkv: torch.Tensor, heads: Heads, turn: Turn | None, room: Room) -> torch.Tensor:
        """As the protocol says."""
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

    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """As the protocol says."""
        gate, up = gate_up.chunk(2, -1)
        return ACTIVATIONS[activation](gate).mul_(up)


class NativeElementwise:
    """In compiled code. `library` is `native.compiled()`."""

    turn_dtype = torch.float32

    def __init__(self, library: ctypes.PyDLL, *, threads: int | None = None) -> None:
        self._library = library
        self._threads = threads

    def _calls(self, numbers: int) -> int:
        """How many threads share a call: starting them takes as long as some thousands of numbers."""
        return self._threads or (torch.get_num_threads() if numbers > 1 << 15 else 1)

    def add_and_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, after: Norm | None, factor: float, norm: Norm | None
    ) -> torch.Tensor:
        """As the protocol says."""
        assert x.is_contiguous() and (delta is None or (delta.is_contiguous() and delta.dtype == x.dtype))
        out = x if norm is None else torch.empty_like(x)
        self._library.add_and_norm(
            x.data_ptr(), 0 if delta is None else delta.data_ptr(), 0 if norm is None else out.data_ptr(),
            0 if after is None else after.exact.data_ptr(), 0 if norm is None else norm.exact.data_ptr(),
            0.0 if after is None else after.epsilon, 0.0 if norm is None else norm.epsilon, factor,
            x.shape[0], x.shape[1], KINDS[x.dtype], self._calls(x.numel()),
        )  # fmt: skip
        return out

    def turn_and_store(self, qkv: torch.Tensor, heads: Heads, turn: Turn | None, room: Room) -> torch.Tensor:
        """As the protocol says; the queries are turned in place."""
        assert qkv.is_contiguous() and room.keys.dtype == room.values.dtype == qkv.dtype
        query, key = heads.query_norm, heads.key_norm
        if turn is not None:
            assert turn.cos.is_contiguous() and turn.sin.is_contiguous() and turn.cos.dtype == torch.float32
        self._library.turn_and_store(
            qkv.data_ptr(), room.keys.data_ptr(), room.values.data_ptr(), room.key_places.data_ptr(),
            room.value_places.data_ptr(),
            0 if turn is None else turn.cos.data_ptr(), 0 if turn is None else turn.sin.data_ptr(),
            0 if query is None else query.exact.data_ptr(), 0 if key is None else key.exact.data_ptr(),
            0.0 if query is None else query.epsilon, 0 if query is None else query.width // heads.dim,
            0 if key is None else key.width // heads.dim, heads.query, heads.kv, heads.dim,
            0 if turn is None else turn.cos.shape[1], qkv.shape[0], KINDS[qkv.dtype], self._calls(qkv.numel()),
        )  # fmt: skip
        return qkv[:, : heads.query]

    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """As the protocol says."""
        assert gate_up.is_contiguous()
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._library.gate(
            gate_up.data_ptr(), out.data_ptr(), *SIGMOID_FORMS[activation], out.shape[0], out.shape[1],
            KINDS[out.dtype], self._calls(gate_up.numel()),
        )  # fmt: skip
        return out


def activation_name(module: object) -> str | None:
    """Which of `ACTIVATIONS` a model's activation is, found by what it gives; None for another one."""
    probe = torch.linspace(-6, 6, 25, dtype=torch.float32)
    assert callable(module)
    found = module(probe)
    return next((name for name, own in ACTIVATIONS.items() if torch.allclose(found, own(probe), atol=1e-6)), None)
