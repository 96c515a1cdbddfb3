"""PEFT's LoRA linear layer with a leaner step: the same numbers from fewer passes over memory.

With W (out, in) frozen, A (r, in), B (out, r) and scaling s, a layer computes y = x W^T + b + s (x A^T) B^T
(LoRA, arXiv:2106.09685). For the backward pass only x and h = x A^T are kept; the update is added into y in place, and
A and B are cast to the dtype of x instead of x to theirs, so that fp32 adapters train beside a bf16 base.

PEFT's own forward stays the reference: an instance changes its class to a subclass and back, and whatever the fast
path does not cover falls through to the parent.
"""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F


class FusedLora(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T for x (tokens, in); gradients of x, A and B alone.

    With `packed` (bitsandbytes' quantisation state) W is in 4 bits, and is unpacked for each of the two passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        packed: Any,
    ) -> Tensor:
        narrow_a, narrow_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        ctx.packed = packed
        result = F.linear(x, _unpacked(weight, packed), bias)
        reduced = F.linear(x, narrow_a)
        result.addmm_(reduced, narrow_b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, narrow_a, narrow_b, reduced)
        ctx.scaling, ctx.master = scaling, lora_a.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, lora_a, lora_b, reduced = ctx.saved_tensors
        grad = grad.contiguous()
        grad_reduced = (grad @ lora_b).mul_(ctx.scaling)
        grad_a = (grad_reduced.t() @ x).to(ctx.master)
        grad_b = (grad.t() @ reduced).to(ctx.master).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _unpacked(weight, ctx.packed)).addmm_(grad_reduced, lora_a)
        return grad_x, None, None, grad_a, grad_b, None, None


class LowRankUpdate(torch.autograd.Function):
    """scaling (x A^T) B^T for x (tokens, in), where the base's product is another's work; keeps x and x A^T alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        narrow_a, narrow_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        reduced = F.linear(x, narrow_a)
        ctx.save_for_backward(x, narrow_a, narrow_b, reduced)
        ctx.scaling, ctx.master = scaling, lora_a.dtype
        return F.linear(reduced, narrow_b).mul_(scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, lora_a, lora_b, reduced = ctx.saved_tensors
        grad_reduced = (grad @ lora_b).mul_(ctx.scaling)
        grad_a = (grad_reduced.t() @ x).to(ctx.master)
        grad_b = (grad.t() @ reduced).to(ctx.master).mul_(ctx.scaling)
        return grad_reduced @ lora_a if ctx.needs_input_grad[0] else None, grad_a, grad_b, None


def _unpacked(weight: Tensor, packed: Any) -> Tensor:
    """W (out, in) in the dtype it is computed in."""
    if packed is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, packed)


class FastLoraLinear(PeftLinear):
    """A PEFT LoRA linear layer that takes the fast path where it may, and its parent's everywhere else."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., in) to (..., out)."""
        name = _only_adapter(self)
        base: Any = self.base_layer
        plain = type(base) is nn.Linear and base.weight.dtype == x.dtype and not base.weight.requires_grad
        if args or kwargs or name is None or not plain or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        return _fused(self, name, x, None)


class FastLora4bit(PeftLinear4bit):
    """The same over a base in 4 bits, unpacked for each pass instead of cast around."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., in) to (..., out)."""
        name = _only_adapter(self)
        packed = getattr(self.base_layer.weight, "quant_state", None)
        # A layout of bitsandbytes' own, for inference on a CPU, is its own to read.
        plain = packed is not None and packed.dtype == x.dtype and not getattr(packed, "packing_format_for_cpu", False)
        if args or kwargs or name is None or not plain or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        return _fused(self, name, x, packed)


class FastLora8bit(PeftLinear8bit):
    """The same beside LLM.int8, whose own product is kept; PEFT would keep each x once more, in fp32."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., in) to (..., out)."""
        name = _only_adapter(self)
        if args or kwargs or name is None or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        layer: Any = self
        result = layer.base_layer(x)
        flat = x.reshape(-1, x.shape[-1])
        lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
        update = LowRankUpdate.apply(flat, lora_a, lora_b, layer.scaling[name])
        return result + update.view_as(result).to(result.dtype)


def _fused(layer: Any, name: str, x: Tensor, packed: Any) -> Tensor:
    base, lora_a, lora_b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    flat = x.reshape(-1, x.shape[-1])
    bias = None if base.bias is None else base.bias.to(x.dtype)
    result = FusedLora.apply(flat, base.weight, bias, lora_a.weight, lora_b.weight, layer.scaling[name], packed)
    return result.view(*x.shape[:-1], result.shape[-1])


def _only_adapter(layer: Any) -> str | None:
    """The one plain adapter to apply, or None where PEFT's general forward is needed."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or layer.lora_B[names[0]].bias is not None:
        return None
    dropout = layer.lora_dropout[names[0]]
    idle = isinstance(dropout, nn.Identity) or not layer.training
    return names[0] if idle else None


FAST: dict[type[nn.Module], type[nn.Module]] = {
    PeftLinear: FastLoraLinear,
    PeftLinear4bit: FastLora4bit,
    PeftLinear8bit: FastLora8bit,
}


def install_fast_lora(model: nn.Module) -> int:
    """Let every plain LoRA linear layer of `model` take the fast path; returns how many do."""
    return _change_class(model, FAST)


def remove_fast_lora(model: nn.Module) -> int:
    """Give every layer back PEFT's own class; returns how many were changed."""
    return _change_class(model, {fast: own for own, fast in FAST.items()})


def _change_class(model: nn.Module, changes: dict[type[nn.Module], type[nn.Module]]) -> int:
    # The fast classes add no state, so that an instance may change class both ways.
    layers = [module for module in model.modules() if type(module) in changes]
    for layer in layers:
        layer.__class__ = changes[type(layer)]
    return len(layers)
