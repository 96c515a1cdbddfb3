"""Frozen weights as the compiled code reads them: in panels of 32 outputs, kept as they are or as int8 or int4.

The layouts are those of products.c. As int8, a weight is a whole number from -127 to 127 times the scale of its group; as
int4, one from 0 to 15 times the scale, and the least of its group, as GGUF's Q8_0 and Q4_1 have them. Scales are in
float16. The head, whose faults nothing after it mends, is int8 in both.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional

from adapterhub_lite.serving.model.compiled.library import StepFunctions

PANEL = 32
Precision = Literal["int8", "int4"]
# As in lanes.h and products.h; the inputs that lie together, or share a scale.
KINDS = {"float32": 0, "bfloat16": 1, "int8": 3, "int4": 4}
TOGETHER = {"float32": 1, "bfloat16": 2, "int8": 64, "int4": 32}
QUANTISED: tuple[Precision, ...] = ("int8", "int4")
# What of a group's span int4 is tried with: where a few weights are far out, the others gain by leaving them there.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


class Product(ctypes.Structure):
    """As in products.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int32), ("outputs", ctypes.c_int32), ("kind", ctypes.c_int32),
    )  # fmt: skip


class PanelStore(Protocol):
    """Where panels were kept before; see `kept_weights`."""

    def packed(self, name: str, make: Callable[[], torch.Tensor], /) -> torch.Tensor:
        """Return the panels (panels, bytes of each) of `name`, made where there are none."""


def pack_weight(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Lay out weight (out, in) as panels, bytes (panels, bytes of each)."""
    outputs, inputs = weight.shape
    together = TOGETHER[kind]
    weight = functional.pad(weight, (0, -inputs % together, 0, -outputs % PANEL))
    panels, groups = weight.shape[0] // PANEL, weight.shape[1] // together
    by_group = weight.view(panels, PANEL, groups, together)
    if kind not in QUANTISED:
        return by_group.permute(0, 2, 1, 3).contiguous().view(panels, -1).view(torch.uint8)
    if kind == "int8":
        numbers, *factors = quantise_int8(by_group)
        # (panel, group, 16, output, 4)
        codes = (numbers + 128).view(panels, PANEL, groups, -1, 4).permute(0, 2, 3, 1, 4)
    else:
        numbers, *factors = quantise_int4(by_group)
        # (panel, group, 4, output, half, 4): the second four of eight are the high halves of the bytes of the first.
        halves = numbers.view(panels, PANEL, groups, -1, 2, 4).permute(0, 2, 3, 1, 4, 5)
        codes = halves[..., 0, :] + halves[..., 1, :] * 16
    parts = [codes.to(torch.uint8).reshape(panels, groups, -1)]
    parts += [factor.permute(0, 2, 1).contiguous().view(torch.uint8).view(panels, groups, -1) for factor in factors]
    return torch.cat(parts, -1).view(panels, -1)


def quantise_int8(by_group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (..., group) from -127 to 127 and their scales (...), float16."""
    weights = by_group.float()
    scales = (weights.abs().amax(-1) / 127).half()
    return (weights / _divisor(scales)).round_().clamp_(-127, 127), scales


def quantise_int4(by_group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers (..., group) from 0 to 15, their scales (...) and what 0 stands for (...), both float16."""
    weights = by_group.float()
    low, high = weights.amin(-1), weights.amax(-1)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    least = torch.empty(0)
    for share in SHARES:
        scales = ((high - low) * share / 15).half()
        mins = ((low + high) / 2 - scales.float() * 7.5).half() if share < 1 else low.half()
        numbers = ((weights - mins.float()[..., None]) / _divisor(scales)).round_().clamp_(0, 15)
        errors = (numbers * scales.float()[..., None] + mins.float()[..., None] - weights).square_().sum(-1)
        if best is None:
            best, least = (numbers, scales, mins), errors
            continue
        better = errors < least
        best = tuple(
            torch.where(better[..., None] if own.dim() > better.dim() else better, own, kept)
            for own, kept in zip((numbers, scales, mins), best, strict=True)
        )  # type: ignore[assignment]
        least = torch.minimum(least, errors)
    assert best is not None
    return best


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """Of a scale that is 0 in float16 the numbers are as good as 0 too."""
    return scales.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]


def unpack_weight(packed: torch.Tensor, kind: str, outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) that panels stand for."""
    panels, together = packed.shape[0], TOGETHER[kind]
    if kind not in QUANTISED:
        by_group = packed.view(getattr(torch, kind)).view(panels, -1, PANEL, together).permute(0, 2, 1, 3)
        return by_group.reshape(panels * PANEL, -1)[:outputs, :inputs]
    groups = -(-inputs // together)
    codes, *factors = packed.view(panels, groups, -1).tensor_split(
        [PANEL * together // (1 if kind == "int8" else 2) + at * 2 * PANEL for at in range(1 if kind == "int8" else 2)],
        -1,
    )
    scales, *mins = (
        factor.contiguous().view(torch.float16).view(panels, groups, PANEL).permute(0, 2, 1).float()[..., None]
        for factor in factors
    )
    if kind == "int8":
        numbers = codes.reshape(panels, groups, -1, PANEL, 4).permute(0, 3, 1, 2, 4).float() - 128
        whole = numbers.reshape(panels, PANEL, groups, together) * scales
    else:
        own = codes.reshape(panels, groups, -1, PANEL, 1, 4)
        numbers = torch.cat((own % 16, own // 16), 4).permute(0, 3, 1, 2, 4, 5).float()
        whole = numbers.reshape(panels, PANEL, groups, together) * scales + mins[0]
    return whole.reshape(panels * PANEL, -1)[:outputs, :inputs].to(dtype)


class PackedLinear:
    """Frozen linear layers with one input as one product, their outputs side by side.

    `release` takes the weights out of the modules they came from, so that they are held once; `give_back` puts them there
    again: as they were, or, quantised, as the nearest that there is. `store` has, or takes, what a quantised weight comes to.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Linear],
        *,
        precision: Precision | None = None,
        store: PanelStore | None = None,
        release: bool = True,
    ) -> None:
        self._modules, self._released = modules, release
        linears = list(modules.values())
        self._sizes = [linear.out_features for linear in linears]
        self._dtype = linears[0].weight.dtype
        self._kind = precision or str(self._dtype).removeprefix("torch.")
        self._inputs = linears[0].in_features

        def pack() -> torch.Tensor:
            weights = [linear.weight.detach() for linear in linears]
            return pack_weight(torch.cat(weights) if len(weights) > 1 else weights[0], self._kind)

        self._packed = store.packed(" ".join(modules), pack) if store and precision else pack()
        self._bias: torch.Tensor | None = None
        if any(linear.bias is not None for linear in linears):
            none = linears[0].weight.new_zeros
            self._bias = torch.cat([none(len(x.weight)) if x.bias is None else x.bias.detach() for x in linears])
        # For the compiled code, which adds in float32; held here, so that the memory stays.
        self._wide_bias = None if self._bias is None else self._bias.float()
        if release:
            for linear in linears:
                linear.weight.data = torch.empty(0, dtype=self._dtype)

    @property
    def product(self) -> Product:
        """What the compiled code is told of it."""
        bias = 0 if self._wide_bias is None else self._wide_bias.data_ptr()
        return Product(self._packed.data_ptr(), bias, self._inputs, sum(self._sizes), KINDS[self._kind])

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take."""
        return self._packed.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes that `tensors` allocates."""
        return self._inputs * sum(self._sizes) * self._dtype.itemsize

    def take_again(self) -> None:
        """Take the weights out of the modules once more, where others have put them back meanwhile."""
        if self._released:
            for linear in self._modules.values():
                linear.weight.data = torch.empty(0, dtype=self._dtype)

    def multiply(self, x: torch.Tensor, functions: StepFunctions) -> torch.Tensor:
        """Return x @ W.T + bias (T, out) in float32, from x (T, in)."""
        x = x.float().contiguous()
        out, product = torch.empty(x.shape[0], sum(self._sizes)), self.product
        address = ctypes.addressof(product)
        scratch = torch.empty(functions.multiply_scratch_bytes(address, x.shape[0]), dtype=torch.uint8)
        functions.multiply(
            address, x.data_ptr(), x.shape[0], out.data_ptr(), scratch.data_ptr(), torch.get_num_threads()
        )
        return out

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights as they are used, in the layout of the modules they came from."""
        dense = unpack_weight(self._packed, self._kind, sum(self._sizes), self._inputs, self._dtype)
        found = dict(zip((f"{name}.weight" for name in self._modules), dense.split(self._sizes), strict=True))
        if self._bias is not None:
            biases = zip(self._modules.items(), self._bias.split(self._sizes), strict=True)
            found |= {f"{name}.bias": bias for (name, linear), bias in biases if linear.bias is not None}
        return found

    def give_back(self) -> None:
        """Put the weights back into the modules they came from; this object cannot be used any more."""
        if self._released:
            dense = self.tensors()
            for name, linear in self._modules.items():
                linear.weight.data = dense[f"{name}.weight"].clone()
            self._packed = torch.empty(0, dtype=torch.uint8)
