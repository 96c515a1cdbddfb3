"""fp32 copies (masters) of the weights that are trained in 16 bits, for the optimizer to step in their place.

A bf16 weight has 8 significant bits: a step smaller than 2^-9 of it is rounded away, and a fine-tuning step mostly is. So
the optimizer is given fp32 copies, with its moments in fp32 too. Before each of its steps the gradients are copied to
them, and after it the weights are rounded from them. Any torch optimizer takes part: all it sees is other parameters.

Gradients of batches that are accumulated would be lost the same way, each in the sum of those before. They are summed in
fp32, and the sum is rounded once, as the gradient of one large batch is.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterhub_lite import devices
from adapterhub_lite.errors import IntegrityError

MASTERS_FILE = "master_weights.safetensors"
NARROW = (torch.bfloat16, torch.float16)
# Optimizers that step inside the backward pass, each weight by itself: nothing of theirs can be put in between.
AT_ONCE = frozenset({"LayerWiseDummyOptimizer", "Lomo", "AdaLomo"})


class MasterWeights:
    """Pairs (weight, its fp32 copy) of one optimizer, kept equal up to rounding by hooks on its steps."""

    def __init__(self, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
        self.pairs = pairs
        self._sums: dict[Tensor, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def put_into(cls, optimizer: torch.optim.Optimizer) -> "MasterWeights":
        """Give `optimizer` fp32 copies of its 16-bit parameters; what it remembers of these becomes fp32 as well.

        An optimizer that has them is left as it is.
        """
        known = masters_of(optimizer)
        if known is not None or type(optimizer).__name__ in AT_ONCE:
            return known or cls([])
        if hasattr(optimizer, "check_overrides"):
            # bitsandbytes finds the settings of single weights by identity, and keeps them by place.
            optimizer.check_overrides()
        pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in optimizer.param_groups:
            for place, weight in enumerate(group["params"]):
                # A part of a tensor that an engine splits is its own to keep.
                if weight.dtype in NARROW and not hasattr(weight, "full_tensor"):
                    master = nn.Parameter(weight.detach().float(), weight.requires_grad)
                    group["params"][place] = master
                    pairs.append((weight, master))
                    if weight in optimizer.state:
                        optimizer.state[master] = _widened(optimizer.state.pop(weight), weight)
        made = cls(pairs)
        if pairs:
            vars(optimizer)["master_weights"] = made
            optimizer.register_step_pre_hook(made.before_step)
            optimizer.register_step_post_hook(made.after_step)
            made._follow_modes(optimizer)
        return made

    def sum_in_fp32(self, last: Callable[[], bool]) -> None:
        """Sum the gradients of accumulated batches in fp32, from now on; `last` tells whether this batch is the last.

        Until then a weight has no gradient of its own; then it has the sum, for clipping, DDP and whoever looks.
        """
        self.sum_no_more()

        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            so_far = self._sums.pop(weight, None)
            if so_far is not None:
                so_far.add_(weight.grad)
            if not last():
                self._sums[weight] = weight.grad.float() if so_far is None else so_far
                weight.grad = None
            elif so_far is not None:
                # In its place: DDP may have a view of it.
                weight.grad.copy_(so_far)

        self._hooks = [
            weight.register_post_accumulate_grad_hook(add) for weight, _ in self.pairs if weight.requires_grad
        ]

    def sum_no_more(self) -> None:
        """Leave gradients alone again, and forget a sum that was not finished."""
        self._sums.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # The arguments of both are torch's, for any hook on a step.
    @torch.no_grad()
    def before_step(self, *_: Any) -> None:
        """Hand the gradients to the copies; a weight that somebody has changed since the last step counts as it is."""
        for (weight, master), changed in zip(self.pairs, self._changed(), strict=True):
            if changed:
                master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))
            # One of the two at a time: together they would be the peak of the run.
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None

    def _changed(self) -> list[bool]:
        """Which weights are not their copies, rounded; a device is waited for once, not once a weight."""
        first = self.pairs[0][0].device
        if not devices.is_accelerator(first):
            return [not torch.equal(master.to(weight.dtype), weight) for weight, master in self.pairs]
        found = [(master.to(weight.dtype) != weight).any().to(first) for weight, master in self.pairs]
        changed: list[bool] = torch.stack(found).tolist()
        return changed

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        """Round the weights from the copies, and hand the gradients back: callbacks may look at them after a step."""
        for weight, master in self.pairs:
            weight.copy_(master)
            if master.grad is not None:
                weight.grad, master.grad = master.grad.to(weight.dtype), None

    def _follow_modes(self, optimizer: torch.optim.Optimizer) -> None:
        """Schedule-free optimizers change the weights when they turn to evaluation and back."""
        for mode in ("train", "eval"):
            change = getattr(optimizer, mode, None)
            if callable(change):

                def changed(*args: Any, change: Any = change, **kwargs: Any) -> Any:
                    try:
                        return change(*args, **kwargs)
                    finally:
                        self.after_step()

                vars(optimizer)[mode] = changed

    def beyond_rounding(self) -> Iterator[tuple[nn.Parameter, nn.Parameter, Tensor | None]]:
        """(weight, copy, the copy's values where they are not the weight's own) of each pair, to put them back later."""
        for weight, master in self.pairs:
            same = torch.equal(master, weight.float())
            yield weight, master, None if same else master.detach().clone()

    def save(self, folder: Path, names: dict[nn.Parameter, str]) -> None:
        """Write the copies into `folder`, by the `names` of their weights.

        Raises:
            OSError: it cannot be written.
        """
        if self.pairs:
            found = {f"{names[weight]}:master": master.detach().cpu() for weight, master in self.pairs}
            save_file(found, folder / MASTERS_FILE)

    @torch.no_grad()
    def load(self, folder: Path, names: dict[nn.Parameter, str]) -> None:
        """Read what `save` wrote; from a checkpoint without copies, they begin at its weights.

        Raises:
            IntegrityError: a copy is missing, or is not of its weight.
        """
        path = folder / MASTERS_FILE
        found = load_file(path) if self.pairs and path.is_file() else None
        for weight, master in self.pairs:
            if found is None:
                master.copy_(weight)
                continue
            kept = found.get(f"{names[weight]}:master")
            if kept is None or not torch.equal(kept.to(weight.device, weight.dtype), weight):
                raise IntegrityError(
                    f"{path} does not hold the fp32 copy of {names[weight]}: resume from another checkpoint."
                )
            master.copy_(kept)


def masters_of(optimizer: torch.optim.Optimizer) -> MasterWeights | None:
    """The fp32 copies that `optimizer` steps, None where it steps the weights themselves."""
    found = vars(optimizer).get("master_weights")
    return found if isinstance(found, MasterWeights) else None


def _widened(state: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """What an optimizer remembers of `weight`, with what is held in its dtype in fp32."""
    narrow = weight.dtype
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype == narrow else value
        for name, value in state.items()
    }
