"""PEFT's LoRA linear layer with a leaner step: the same numbers from fewer passes over memory.

With W (out, in) frozen, A (r, in), B (out, r) and scaling s, a layer computes y = x W^T + b + s (x A^T) B^T
(LoRA, arXiv:2106.09685). For the backward pass only x and h = x A^T are kept; the update is added into y in place, and
A and B are cast to the dtype of x instead of x to theirs, so that fp32 adapters train beside a bf16 base.

PEFT's own forward stays the reference: an instance changes its class to a subclass and back, and whatever the fast
path does not cover falls through to the parent.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F


class FusedLora(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T for x (tokens, in); gradients of x, A and B alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        narrow_a, narrow_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        result = F.linear(x, weight, bias)
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
            grad_x = (grad @ weight).addmm_(grad_reduced, lora_a)
        return grad_x, None, None, grad_a, grad_b, None


class FastLoraLinear(PeftLinear):
    """A PEFT LoRA linear layer that takes the fast path where it may, and its parent's everywhere else."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., in) to (..., out)."""
        name = self._only_adapter()
        if args or kwargs or name is None or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        if base.weight.dtype != x.dtype or base.weight.requires_grad or lora_b.bias is not None:
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        result = FusedLora.apply(flat, base.weight, base.bias, lora_a.weight, lora_b.weight, self.scaling[name])
        return result.view(*x.shape[:-1], result.shape[-1])

    def _only_adapter(self) -> str | None:
        """The one plain adapter to apply, or None where PEFT's general forward is needed."""
        if self.disable_adapters or self.merged or type(self.base_layer) is not nn.Linear:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or names[0] in self.lora_variant:
            return None
        dropout = self.lora_dropout[names[0]]
        idle = isinstance(dropout, nn.Identity) or not self.training
        return names[0] if idle else None


def install_fast_lora(model: nn.Module) -> int:
    """Let every plain LoRA linear layer of `model` take the fast path; returns how many do."""
    return _change_class(model, PeftLinear, FastLoraLinear)


def remove_fast_lora(model: nn.Module) -> int:
    """Give every layer back PEFT's own class; returns how many were changed."""
    return _change_class(model, FastLoraLinear, PeftLinear)


def _change_class(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> int:
    # FastLoraLinear adds no state, so that an instance may change class both ways.
    layers = [module for module in model.modules() if type(module) is old]
    for layer in layers:
        layer.__class__ = new
    return len(layers)
