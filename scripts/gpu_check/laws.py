"""Law 1 on the device at hand: every implementation of the loss against the fp64 truth, in each dtype and for each option."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_lite.losses import Head, LossOptions, full_cross_entropy
from adapterhub_lite.losses.kernels import KERNELS, OWN_KERNEL, refuse_kernel, run_kernel
from adapterhub_lite.losses.tiled import tiled_cross_entropy
from scripts.gpu_check.sizes import Sizes

OPTIONS: dict[str, LossOptions] = {
    "plain": LossOptions(reduction="sum"),
    "softcap": LossOptions(reduction="sum", softcap=5.0),
    "scale and z-loss": LossOptions(reduction="sum", logit_scale=0.5, z_loss=0.01),
    "smoothing": LossOptions(reduction="sum", label_smoothing=0.1),
}
# How much larger our error may be than that of the full logits in the same dtype.
SLACK = 1.1
Loss = Callable[[Tensor, Any, Tensor, LossOptions], Tensor]


def by_rung(name: str) -> Loss:
    """The loss of a rung of the ladder."""

    def loss(hidden: Tensor, weight: nn.Parameter, targets: Tensor, options: LossOptions) -> Tensor:
        if name == "tiled":
            return tiled_cross_entropy(hidden, weight, targets, options)
        return run_kernel(name, hidden, head_of(weight, options), targets, options, None)

    return loss


def loss_laws(sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (rung, dtype, option) with the errors of loss and gradients, relative to the truth's norm."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, weight, targets = law_inputs(sizes, dtype)
        for option, options in OPTIONS.items():
            truth = tried(full_cross_entropy, hidden.double(), weight.double(), targets, options)
            naive = tried(full_cross_entropy, hidden, weight, targets, options)
            for name in ("tiled", OWN_KERNEL, *KERNELS):
                case = f"{name}, {str(dtype).removeprefix('torch.')}, {option}"
                head = head_of(nn.Parameter(weight), options)
                # Triton's interpreter runs our kernels on a CPU, which the ladder never does.
                rehearsed = name == OWN_KERNEL and sizes.device.type == "cpu"
                why_not = None if name == "tiled" or rehearsed else refuse_kernel(name, head, sizes.device, options)
                if why_not is not None:
                    yield case, {"not used": why_not}
                    continue
                yield case, judged(tried(by_rung(name), hidden, weight, targets, options), naive, truth, dtype)


def head_of(weight: nn.Parameter, options: LossOptions) -> Head:
    """A head of this weight."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = weight
    return Head(module, options.softcap, options.logit_scale)


def law_inputs(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets of awkward sizes, a third of them ignored."""
    tokens, vocabulary, columns = sizes.loss_law
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, columns, generator=draw).to(sizes.device, dtype)
    weight = (torch.randn(vocabulary, columns, generator=draw) * 2 / columns**0.5).to(sizes.device, dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    targets[::3] = -100
    return hidden, weight, targets.to(sizes.device)


def tried(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions) -> list[Tensor]:
    """[loss, gradient of the states, gradient of the head] in fp64."""
    states, rows = hidden.detach().requires_grad_(), nn.Parameter(weight.detach())
    value = loss(states, rows, targets, options)
    return [one.detach().double() for one in (value, *torch.autograd.grad(value, [states, rows]))]


def judged(ours: list[Tensor], naive: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Our errors beside those of the full logits, and whether the law holds."""
    found: dict[str, Any] = {"ok": True}
    for what, our, plain, true in zip(("loss", "states", "head"), ours, naive, truth, strict=True):
        error, allowed = (float((x - true).norm() / true.norm()) for x in (our, plain))
        found[what] = [error, allowed]
        # In fp32 both are at the noise; the sum of a loss may be lucky in any dtype.
        floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5 if what == "loss" else 0.0)
        found["ok"] &= error <= allowed * SLACK + floor
    return found
