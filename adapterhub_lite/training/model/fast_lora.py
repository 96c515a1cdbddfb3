"""PEFT's LoRA linear layer with a leaner step: the same numbers from fewer passes over memory.

With W (out, in) frozen, A (r, in), B (out, r) and scaling s, a layer computes y = x W^T + b + s (x A^T) B^T
(LoRA, arXiv:2106.09685). For the backward pass only h = x A^T and x are kept, and x only where it cannot be made again
(`remade`). The update is added into y in place, and A and B are cast to the dtype of x instead of x to theirs, so that
fp32 adapters train beside a bf16 base. On a CPU with a C compiler the products of low rank are our own (`low_rank`),
which keep A, B and h in fp32.

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

from adapterhub_lite.training.model.lean_blocks import blocks_for, passing
from adapterhub_lite.training.model.low_rank import LowRank, low_rank_for
from adapterhub_lite.training.model.remade import Maker, Recipe, recipe_of


class FusedLora(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T for x (tokens, in); gradients of x, A and B alone.

    With `packed` (bitsandbytes' quantisation state) W is in 4 bits, and is unpacked for each of the two passes. With a
    `recipe` x is not kept.
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
        recipe: Recipe | None,
    ) -> Tensor:
        ctx.packed = packed
        weights = _unpacked(weight, packed)
        if bias is None and (recipe is None or recipe.ends_block) and blocks_for(x) is not None:
            result = torch.mm(x, weights.t(), out=passing((len(x), len(weights)), x.dtype))
        else:
            result = F.linear(x, weights, bias)
        ctx.save_for_backward(weight, *_add_update(ctx, result, x, lora_a, lora_b, scaling, recipe))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad @ _unpacked(weight, ctx.packed) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = _gradients(ctx, grad, grad_x, *kept)
        return grad_x, None, None, grad_a, grad_b, None, None, None


class LowRankUpdate(torch.autograd.Function):
    """scaling (x A^T) B^T for x (tokens, in), where the base's product is another's work, which keeps x too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        made = x.new_zeros(len(x), len(lora_b))
        ctx.save_for_backward(*_add_update(ctx, made, x, lora_a, lora_b, scaling, None))
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        down, *_ = kept = ctx.saved_tensors
        grad_x = grad.new_zeros(len(grad), down.shape[1]) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = _gradients(ctx, grad.contiguous(), grad_x, *kept)
        return grad_x, grad_a, grad_b, None


def _add_update(
    ctx: Any, result: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, recipe: Recipe | None
) -> tuple[Tensor, ...]:
    """Add scaling (x A^T) B^T to `result` (tokens, out); what `_gradients` wants of the step."""
    ctx.scaling, ctx.master, ctx.maker = scaling, lora_a.dtype, recipe and recipe.maker
    ctx.compiled = compiled = low_rank_for(x, len(lora_a))
    if compiled is not None:
        x = x.contiguous()
        down, up = lora_a.float().contiguous(), lora_b.float().t().contiguous()
        reduced = compiled.reduce(x, down)
        compiled.update(result, up, reduced, scaling)
    else:
        down, up = lora_a.to(x.dtype), lora_b.to(x.dtype)
        reduced = F.linear(x, down)
        result.addmm_(reduced, up.t(), alpha=scaling)
    if recipe is None:
        return down, up, reduced, x
    recipe.maker.add_reader()
    return down, up, reduced, *recipe.parts


def _gradients(
    ctx: Any, grad: Tensor, grad_x: Tensor | None, down: Tensor, up: Tensor, reduced: Tensor, *parts: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B; that of x, which is in `parts` or made of them, is added to `grad_x`."""
    maker: Maker | None = ctx.maker
    x = parts[0] if maker is None else maker.again(parts).reshape(-1, down.shape[1])
    compiled: LowRank | None = ctx.compiled
    if compiled is not None:
        grad_reduced = compiled.reduce(grad, up, ctx.scaling)
        grad_a = compiled.gradient(x, grad_reduced).to(ctx.master)
        grad_b = compiled.gradient(grad, reduced, ctx.scaling).t().to(ctx.master)
        if grad_x is not None:
            compiled.update(grad_x, down, grad_reduced)
        return grad_a, grad_b
    grad_reduced = (grad @ up).mul_(ctx.scaling)
    grad_a = (grad_reduced.t() @ x).to(ctx.master)
    grad_b = (grad.t() @ reduced).to(ctx.master).mul_(ctx.scaling)
    if grad_x is not None:
        grad_x.addmm_(grad_reduced, down)
    return grad_a, grad_b


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
    scaling, recipe = layer.scaling[name], recipe_of(x)
    result = FusedLora.apply(flat, base.weight, bias, lora_a.weight, lora_b.weight, scaling, packed, recipe)
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
