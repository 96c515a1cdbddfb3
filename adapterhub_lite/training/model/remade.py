"""What a layer's cheap parts have made, made again in the backward pass instead of kept for it.

A LoRA layer wants its input once more for the gradient of A. Where that is the result of an RMSNorm or of a gate, which
keep their own inputs anyway, those are enough: of a Llama's activations this leaves two thirds. The same code runs on the
same numbers, so that the bits are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NAME = "_adapterhub_recipe"


class Maker:
    """Makes a tensor again, once for all layers that read it. It holds no tensor between forward and backward."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make, self._readers = make, 0
        self._made: Tensor | None = None

    def add_reader(self) -> None:
        """One more layer will ask for the tensor."""
        self._readers += 1

    def again(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The tensor from its parts; held until the last reader has asked."""
        made = self._made if self._made is not None else self._make(*parts)
        self._readers -= 1
        self._made = made if self._readers > 0 else None
        return made


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor was made: by `maker` from `parts`, and which writes each had seen then.

    `ends_block` says that the layer that reads it is the last of its block: its result is added to the states, and gone.
    """

    maker: Maker
    ends_block: bool
    parts: tuple[Tensor, ...]
    versions: tuple[int, ...]


def remember(made: Tensor, make: Callable[..., Tensor], *parts: Tensor, ends_block: bool = False) -> None:
    """Note that `made` is `make(*parts)`, with nothing in `make` but constants; not where no gradient is wanted or it is traced."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        parts = tuple(part.detach() for part in parts)
        setattr(made, _NAME, Recipe(Maker(make), ends_block, parts, _versions(made, *parts)))


def recipe_of(x: Tensor) -> Recipe | None:
    """How `x` was made, if that is known, and neither it nor its parts were written to since."""
    recipe: Recipe | None = getattr(x, _NAME, None)
    return recipe if recipe is not None and recipe.versions == _versions(x, *recipe.parts) else None


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)
