"""Shared by the tests of the losses: tiles small enough that tiny problems have many, and one law's comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterhub_lite.loss_sizes import LIMITS, TileLimits
from adapterhub_lite.losses import LossOptions, full_cross_entropy
from adapterhub_lite.losses.tiled import tiled_cross_entropy


@dataclass
class Case:
    """One loss to be computed: tensors of any dtype, options, and what is trained."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    token_weights: Tensor | None
    options: LossOptions
    trained: tuple[str, ...] = ("hidden", "weight", "bias")

    @classmethod
    def random(
        cls,
        seed: int,
        tokens: int,
        vocabulary: int,
        columns: int,
        *,
        masked: float = 0.3,
        bias: bool = False,
        weights: bool = False,
        spread: float = 1.0,
        trained: tuple[str, ...] = ("hidden", "weight", "bias"),
        **options: Any,
    ) -> "Case":
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        targets = torch.randint(vocabulary, (tokens,), generator=draw)
        targets[torch.rand(tokens, generator=draw) < masked] = options.get("ignore_index", -100)
        return cls(
            normal(tokens, columns) * spread,
            normal(vocabulary, columns) / columns**0.5,
            targets,
            normal(vocabulary) if bias else None,
            torch.rand(tokens, generator=draw) if weights else None,
            LossOptions(**options),
            trained,
        )

    def to(self, dtype: torch.dtype) -> "Case":
        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        wide = torch.promote_types(dtype, torch.float32)
        weights = None if self.token_weights is None else self.token_weights.to(wide)
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            bias=cast(self.bias),
            token_weights=weights,
        )

    def run(self, tiled: bool, upstream: Tensor | float = 1.0, triton: bool = False) -> dict[str, Tensor]:
        """The loss and the gradients of what is trained, by the tiles, of Triton or of torch, or by the full logits."""
        leaves = {}
        for name in ("hidden", "weight", "bias"):
            value = getattr(self, name)
            leaves[name] = None if value is None else value.detach().clone().requires_grad_(name in self.trained)
        loss_of = partial(tiled_cross_entropy, triton=triton) if tiled else full_cross_entropy
        loss = loss_of(
            leaves["hidden"],
            leaves["weight"],
            self.targets,
            self.options,
            bias=leaves["bias"],
            token_weights=self.token_weights,
        )
        (loss * upstream).sum().backward()
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
        return {"loss": loss.detach(), **found}


@contextmanager
def tiles_of(tokens: int, vocabulary: int) -> Iterator[None]:
    """Tiles of at most (tokens, about vocabulary), so that a small problem is cut into many."""
    with pytest.MonkeyPatch.context() as patch:
        small = TileLimits(tokens, tokens * vocabulary, LIMITS["cpu"].panel, least_vocabulary=1)
        patch.setitem(LIMITS, "cpu", small)
        yield


@pytest.fixture
def case() -> type[Case]:
    """Builds and runs one comparison."""
    return Case


@pytest.fixture(scope="session")
def small_tiles() -> Any:
    """Context manager (tokens, vocabulary): tiles of this size."""
    return tiles_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that asks for `head_trained` both ways the loss can take."""
    if "head_trained" in metafunc.fixturenames:
        metafunc.parametrize("head_trained", [False, True], ids=["frozen", "trained"])
