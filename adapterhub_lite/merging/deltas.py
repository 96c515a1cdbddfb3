"""An adapter as what it adds to each module: delta = B @ A, with the scaling inside B, in fp32. Torch is imported on use."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_lite.adapter_format.binding import read_pairs
from adapterhub_lite.adapter_format.changes import LORA_A, LORA_B, tensor_name
from adapterhub_lite.adapter_format.manifest import LoraRecord

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Factors:
    """One module's change: `b` (out, rank) @ `a` (rank, in); with `magnitude` (out,), a DoRA's."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    magnitude: "torch.Tensor | None" = None

    @property
    def rank(self) -> int:
        """How many rows `a` has."""
        return self.a.shape[0]

    def delta(self, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """The change itself, (out, in), multiplied out in `dtype` (None: float32)."""
        import torch

        dtype = dtype or torch.float32
        return self.b.to(dtype) @ self.a.to(dtype)

    def change(self, weight: "torch.Tensor") -> "torch.Tensor":
        """What this module's weight (out, in), in float32, is changed by.

        LoRA: the delta. DoRA (arXiv:2402.09353): W' = m (W + delta) / norm, each row of the sum by its own norm.
        """
        delta = self.delta()
        if self.magnitude is None:
            return delta
        turned = weight + delta
        return turned * (self.magnitude.float() / turned.norm(dim=1))[:, None] - weight

    def padded(self, rank: int) -> "Factors":
        """The same change with zero rows and columns up to `rank`."""
        import torch

        more = rank - self.rank
        if more == 0:
            return self
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        return Factors(a, torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1))


def read_factors(path: Path, lora: LoraRecord) -> dict[str, Factors]:
    """Read the (validated) weights of an adapter: module name -> factors, the module's own scaling in `b`."""
    pairs = read_pairs(path, lora.scaling_of)
    return {
        module: Factors(pair.a.float(), pair.b.float() * pair.scaling, pair.magnitude) for module, pair in pairs.items()
    }


def as_tensors(factors: dict[str, Factors], dtype: "torch.dtype") -> dict[str, "torch.Tensor"]:
    """The tensors of a PEFT file for these factors, whose configuration has to scale by one."""
    tensors = {}
    for module, pair in sorted(factors.items()):
        tensors[tensor_name(module, LORA_A)] = pair.a.to(dtype).contiguous()
        tensors[tensor_name(module, LORA_B)] = pair.b.to(dtype).contiguous()
    return tensors


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: how a product is split among threads decides its last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
