"""The two elementwise blocks of a layer, keeping less for the backward pass: RMSNorm and the gated MLP.

transformers' RMSNorm keeps its input in fp32, and its gated MLP keeps act(gate) beside gate and up; both can be had
again cheaply from what is kept anyway. A module is taken only after the plain form here was found to give the same bits
as its own forward; on a CPU the compiled form stands in for the plain one.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterhub_lite.bases.layer_parts import Activation, GateParts, NormParts, gate_parts, norm_parts
from adapterhub_lite.training.model.lean_blocks import blocks_for
from adapterhub_lite.training.model.remade import remember

PROBE_ROWS = 4


def plain_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float, wide: bool) -> tuple[Tensor, Tensor]:
    """((offset + weight) * x / rms(x), 1 / rms(x)) for x (..., D), the mean in fp32; `wide` rounds once, at the end."""
    states = x.float()
    scale = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon)
    normed = states * scale
    if wide:
        return (normed * (offset + weight.float())).to(x.dtype), scale
    return (offset + weight if offset else weight) * normed.to(x.dtype), scale


def normed(x: Tensor, weight: Tensor, epsilon: float, offset: float, wide: bool) -> tuple[Tensor, Tensor]:
    """`plain_norm` by the compiled form where there is one; x is contiguous for it."""
    blocks = blocks_for(x, weight)
    if blocks is not None:
        return blocks.norm(x, weight.float() + offset, epsilon, once=wide)
    return plain_norm(x, weight, epsilon, offset, wide)


class LeanNorm(torch.autograd.Function):
    """`plain_norm` of a frozen weight; keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0, wide: bool = False) -> Tensor:
        made, scale = normed(x, weight, epsilon, offset, wide)
        ctx.save_for_backward(x, weight.float() + offset, scale)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, factor, scale = ctx.saved_tensors
        blocks = blocks_for(grad, x)
        if blocks is not None:
            return blocks.norm_backward(grad.contiguous(), x, factor, scale), None, None, None, None
        normed = x * scale if x.dtype == torch.float32 else x.float().mul_(scale)
        wide = grad * factor
        mean = (wide * normed).mean(-1, keepdim=True)
        return torch.addcmul(wide, normed, mean, value=-1.0).mul_(scale).to(x.dtype), None, None, None, None


def opened(gate: Tensor, activation: Activation) -> Tensor:
    """act(gate)."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up for two (..., width) of the same strides, from row to row."""
    blocks = blocks_for(gate, up)
    if blocks is None:
        return opened(gate, activation).mul_(up)
    made = blocks.gate(_rows(gate), _rows(up), gelu=activation == "gelu_tanh")
    return made.view(gate.shape)


def gated_halves(both: Tensor, activation: Activation) -> Tensor:
    """`gated` of the halves of (..., 2 * width)."""
    gate, up = both.chunk(2, -1)
    return gated(gate, up, activation)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, to_gate: Tensor, to_up: Tensor, act: Activation) -> None:
    """Write the gradients of `gated` into `to_gate` and `to_up`, which lie as gate and up do."""
    blocks = blocks_for(grad, gate, up)
    if blocks is not None:
        both = _rows(to_gate), _rows(to_up)
        return blocks.gate_backward(_rows(grad.contiguous()), _rows(gate), _rows(up), *both, gelu=act == "gelu_tanh")
    if act == "silu":
        to_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    else:
        to_gate.copy_(torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"))
    torch.mul(grad, opened(gate, act), out=to_up) if to_up.is_contiguous() else to_up.copy_(grad * opened(gate, act))
    return None


def _rows(x: Tensor) -> Tensor:
    """x (..., width) as (rows, width), without a copy."""
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.flatten(0, -2)


class LeanGate(torch.autograd.Function):
    """act(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        made = torch.empty_like(gate), torch.empty_like(up)
        gated_backward(grad, gate, up, *made, ctx.activation)
        return *made, None


class LeanJoinedGate(torch.autograd.Function):
    """The same for one tensor (..., 2 * width) that holds the gate before what it opens for."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        return gated_halves(both, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (both,) = ctx.saved_tensors
        made = torch.empty_like(both)
        (gate, up), (to_gate, to_up) = both.chunk(2, -1), made.chunk(2, -1)
        gated_backward(grad, gate, up, to_gate, to_up, ctx.activation)
        return made, None


class _Norm(nn.Module):
    """Stands before a module's own class: same state, other `forward`."""

    parts: NormParts

    def forward(self, hidden_states: Tensor) -> Tensor:
        module = cast(Any, self)
        if module.weight.requires_grad:
            return cast(Tensor, super().forward(hidden_states))
        x, constants = hidden_states.contiguous(), (self.parts.epsilon, self.parts.offset, self.parts.wide)
        made = LeanNorm.apply(x, module.weight, *constants)
        remember(made, lambda x, weight: normed(x, weight, *constants)[0], x, module.weight)
        return made


class _Gated(nn.Module):
    """Stands before a module's own class: same state, other `forward`."""

    activation: Activation

    def forward(self, x: Tensor) -> Tensor:
        module = cast(Any, self)
        joined, activation = getattr(module, "gate_up_proj", None), self.activation
        if joined is not None:
            both = joined(x).contiguous()
            made = LeanJoinedGate.apply(both, activation)
            remember(made, lambda both: gated_halves(both, activation), both, ends_block=True)
        else:
            gate, up = module.gate_proj(x).contiguous(), module.up_proj(x).contiguous()
            made = LeanGate.apply(gate, up, activation)
            remember(made, lambda gate, up: gated(gate, up, activation), gate, up, ends_block=True)
        return cast(Tensor, module.down_proj(made))


def install_lean_modules(model: nn.Module) -> int:
    """Let every RMSNorm and gated MLP of `model` that gives the same bits keep less; returns how many do."""
    count = 0
    packed = _packed_dtype(model)
    for module in list(model.modules()):
        if isinstance(module, _Norm | _Gated):
            continue
        norm, gate = norm_parts(module), gate_parts(module)
        if norm is not None and _same_bits(module, norm.weight.shape[0], _norm_of(norm), norm.weight, packed):
            put_before(module, _Norm, {"parts": norm})
        elif gate is not None and _same_bits(module, _width_of(gate), _gate_of(gate), _weight_of(gate), packed):
            put_before(module, _Gated, {"activation": gate.activation})
        else:
            continue
        count += 1
    return count


def remove_lean_modules(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        if isinstance(module, _Norm | _Gated):
            take_away(module)


def put_before(module: Any, front: type[nn.Module], constants: dict[str, Any]) -> None:
    """Let `module` take `forward` from `front`; it keeps its state, and its class's name at the end of its own."""
    original = type(module)
    module.__class__ = type(f"Lean{original.__name__}", (front, original), constants)


def take_away(module: Any) -> None:
    """Undo `put_before`."""
    module.__class__ = type(module).__mro__[2]


def _norm_of(parts: NormParts) -> Callable[[Tensor], Tensor]:
    return lambda x: plain_norm(x, parts.weight, parts.epsilon, parts.offset, parts.wide)[0]


def _gate_of(parts: GateParts) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        if parts.joined is not None:
            gate, up = parts.joined(x).chunk(2, -1)
        else:
            assert parts.gate is not None and parts.up is not None, "a gate is joined or has both"
            gate, up = parts.gate(x), parts.up(x)
        return cast(Tensor, parts.down(opened(gate, parts.activation) * up))

    return step


def _weight_of(parts: GateParts) -> Tensor:
    return cast(Tensor, cast(Any, parts.joined or parts.gate).weight)


def _width_of(parts: GateParts) -> int:
    return int(cast(Any, parts.joined or parts.gate).in_features)


def _packed_dtype(model: nn.Module) -> torch.dtype:
    """What quantised weights, which are stored in bytes, are computed in: the dtype of the weights beside them."""
    kinds = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    return min(kinds, key=lambda dtype: dtype.itemsize, default=torch.float32)


@torch.no_grad()
def _same_bits(
    module: nn.Module, width: int, plain: Callable[[Tensor], Tensor], weight: Tensor, packed: torch.dtype
) -> bool:
    """Whether `plain` gives the bits of the module's own forward, for states of the dtype that it is given."""
    dtype = weight.dtype if weight.is_floating_point() else packed
    probe = torch.linspace(-3, 3, PROBE_ROWS * width, device=weight.device).view(PROBE_ROWS, width).to(dtype)
    try:
        return torch.equal(plain(probe), module(probe))
    except RuntimeError:
        # It wants something else than one tensor of states.
        return False
