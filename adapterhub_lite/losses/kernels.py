"""The Triton kernels, ours and those of others: when one may be used, and the call. Imports them only when asked.

A kernel is used only after it has agreed with our tiles on this GPU, with this head: some round more than their dtype
requires, leave out small gradients, or change what an argument means from version to version.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from adapterhub_lite import devices
from adapterhub_lite.losses.heads import Head
from adapterhub_lite.losses.reference import LossOptions, reduce_losses
from adapterhub_lite.losses.rows import is_quantised, is_sharded, is_zero3, rows_shape
from adapterhub_lite.losses.tiled import tiled_cross_entropy

KERNELS = {
    "cut_cross_entropy": ("cut_cross_entropy", "linear_cross_entropy"),
    "liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
}
"""Name of a rung -> where the kernel of others is."""

OWN_KERNEL = "triton"
"""The rung of our own kernels, in `triton_tiles`. They read any head that the tiles can read, and know every option."""

TRIAL_TOKENS = 64


def refuse_kernel(name: str, head: Head, device: torch.device, options: LossOptions) -> str | None:
    """Why the kernel cannot compute this loss; None when it can, which a trial has then shown."""
    capability = devices.compute_capability(device)
    # Those of others are written for CUDA, and ROCm where it is called so.
    if not devices.runs_triton(device) or (name != OWN_KERNEL and not devices.is_cuda(device)):
        return f"its kernels need a GPU, and the head is on {device.type}"
    too_old = capability is not None and capability < (8, 0)
    if too_old and name in ("cut_cross_entropy", OWN_KERNEL):
        return "its kernels need compute capability 8.0 or newer"
    if name == OWN_KERNEL:
        if find_spec("triton") is None:
            return "the package triton is not installed"
        if head.weight.dtype == torch.float64:
            return "its kernels have no sums in fp64"
        return disagreement(name, head, options)
    if head.widens:
        return "it would leave what is trained of the head untrained"
    if is_quantised(head.weight) or is_sharded(head.weight) or is_zero3(head.weight):
        return "it reads only a plain weight"
    asked = {
        "a bias": head.bias is not None,
        "label smoothing": options.label_smoothing,
        "z-loss": options.z_loss,
        "a logit scale": head.logit_scale != 1.0,
    }
    unsupported = [option for option, used in asked.items() if used]
    if unsupported:
        return f"not used together with {', '.join(unsupported)}"
    if head.weight.dtype == torch.float16:
        return "its gradients are computed before a gradient scaler's factor is known"
    try:
        _kernel(name)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return disagreement(name, head, options)


def run_kernel(
    name: str, hidden: Tensor, head: Head, targets: Tensor, options: LossOptions, token_weights: Tensor | None
) -> Tensor:
    """The losses of a Triton rung, reduced as `options` say. hidden (N, D), targets (N,).

    Raises:
        ImportError: the package is gone since the choice was made.
    """
    if name == OWN_KERNEL:
        return tiled_cross_entropy(
            hidden, head.weight, targets, options, bias=head.bias, token_weights=token_weights, triton=True
        )
    kernel, asked = _kernel(name), {"ignore_index": options.ignore_index, "softcap": head.softcap}
    # Liger computes its gradients in forward, and has to recompute them where each loss has a weight of its own.
    at_once = name == "liger" and options.reduction == "sum" and token_weights is None
    reduction = "sum" if at_once else "none"
    if name == "liger":
        losses = kernel(reduction=reduction, **asked)(head.weight, hidden, targets)
    else:
        losses = kernel(hidden, head.weight, targets, reduction=reduction, **asked)
    losses = losses.float()
    return (
        losses if at_once else reduce_losses(losses, targets != options.ignore_index, options.reduction, token_weights)
    )


def _kernel(name: str) -> Callable[..., Any]:
    package, attribute = KERNELS[name]
    found: Callable[..., Any] = getattr(import_module(package), attribute)
    return found


def disagreement(name: str, head: Head, asked: LossOptions) -> str | None:
    """Loss and gradients of a few random tokens by the kernel and by our tiles; a sentence when they differ."""
    weight, bias = head.weight, head.bias
    vocabulary, columns = rows_shape(weight)
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
    draw = torch.Generator(weight.device).manual_seed(0)
    states = torch.randn((TRIAL_TOKENS, columns), generator=draw, device=weight.device).to(dtype)
    targets = torch.randint(vocabulary, (TRIAL_TOKENS,), generator=draw, device=weight.device)
    options = replace(asked, reduction="sum", softcap=head.softcap, logit_scale=head.logit_scale, gradient_filter=0.0)
    targets[::5] = options.ignore_index

    def tried(loss_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = states.clone().requires_grad_()
        with torch.enable_grad():
            loss = loss_of(leaf)
            leaves = [leaf, *(x for x in (weight, bias) if x is not None and x.requires_grad)]
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    try:
        theirs = tried(lambda leaf: run_kernel(name, leaf, head, targets, options, None))
    except Exception as error:  # a kernel that does not compile or run here: whatever it says is the reason
        return f"{type(error).__name__} in a trial: {error}"
    ours = tried(lambda leaf: tiled_cross_entropy(leaf, weight, targets, options, bias=bias))
    limit = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for what, their, our in zip(("loss", "gradient", *["gradient of the head"] * 2), theirs, ours, strict=False):
        apart = float((their.float() - our.float()).norm() / our.float().norm())
        if not apart <= limit:
            return f"in a trial its {what} is {apart:.2g} away from that of the tiles, relatively"
    return None
