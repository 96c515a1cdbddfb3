"""The two elementwise blocks of a Llama-like layer, keeping less for the backward pass: RMSNorm and the gated MLP.

transformers' RMSNorm keeps its input in fp32, and its gated MLP keeps silu(gate) beside gate and up; both can be had
again cheaply from what is kept anyway. A module is taken only after its own forward was found to give the same bits.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROBE_ROWS = 4


class LeanNorm(torch.autograd.Function):
    """weight * (x / rms(x)) for x (..., D), with the mean in fp32; keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale if x.dtype == torch.float32 else x.float().mul_(scale)
        wide = (grad * weight).float()
        mean = (wide * normed).mean(-1, keepdim=True)
        # Not in place on `wide`: in fp32 it may be the caller's own tensor.
        return torch.addcmul(wide, normed, mean, value=-1.0).mul_(scale).to(x.dtype), None, None


class LeanGate(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class _Norm(nn.Module):
    """Stands before a module's own class: same state, other `forward`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module = cast(Any, self)
        if module.weight.requires_grad:
            return cast(Tensor, super().forward(hidden_states))
        return LeanNorm.apply(hidden_states, module.weight, module.variance_epsilon)


class _Gated(nn.Module):
    """Stands before a module's own class: same state, other `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        module = cast(Any, self)
        return cast(Tensor, module.down_proj(LeanGate.apply(module.gate_proj(x), module.up_proj(x))))


def install_lean_modules(model: nn.Module) -> int:
    """Let every RMSNorm and gated MLP of `model` that gives the same bits keep less; returns how many do."""
    count = 0
    packed = _packed_dtype(model)
    for module in list(model.modules()):
        front = _front_for(module)
        if front is None:
            continue
        original = type(module)
        # The module keeps its state and its name's ending; only `forward` comes from the front.
        module.__class__ = type(f"Lean{original.__name__}", (front, original), {})
        if _same_bits(module, original, _states_dtype(module, packed)):
            count += 1
        else:
            module.__class__ = original
    return count


def remove_lean_modules(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        if isinstance(module, _Norm | _Gated):
            module.__class__ = type(module).__mro__[2]


def _front_for(module: nn.Module) -> type[nn.Module] | None:
    if isinstance(module, _Norm | _Gated):
        return None
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if type(module).__name__.endswith("RMSNorm") and own == {"weight"} and hasattr(module, "variance_epsilon"):
        return _Norm
    children = {name for name, _ in module.named_children()}
    if children == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not own:
        return _Gated
    return None


def _packed_dtype(model: nn.Module) -> torch.dtype:
    """What quantised weights, which are stored in bytes, are computed in: the dtype of the weights beside them."""
    kinds = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    return min(kinds, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _states_dtype(module: Any, packed: torch.dtype) -> torch.dtype:
    """The dtype of the states that `module` is given."""
    weight: Tensor = getattr(module, "gate_proj", module).weight
    return weight.dtype if weight.is_floating_point() else packed


@torch.no_grad()
def _same_bits(module: Any, original: type[nn.Module], dtype: torch.dtype) -> bool:
    parameter = next(module.parameters())
    gated = isinstance(module, _Gated)
    width = module.gate_proj.in_features if gated else parameter.shape[0]
    probe = torch.linspace(-3, 3, PROBE_ROWS * width, device=parameter.device).view(PROBE_ROWS, width).to(dtype)
    try:
        # Not through the front's own forward, which steps aside for a weight that is trained.
        found = module(probe) if gated else LeanNorm.apply(probe, module.weight, module.variance_epsilon)
        return torch.equal(found, original.forward(module, probe))
    except RuntimeError:
        # It wants something else than one tensor of states.
        return False
