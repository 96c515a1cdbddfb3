"""An adapter as what it adds to each module: delta = B @ A, with the scaling inside B, in fp32. Knows torch only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from adapterhub_lite.adapter_format.manifest import LoraRecord

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """One module's change: `b` (out, rank) @ `a` (rank, in)."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """How many rows `a` has."""
        return self.a.shape[0]

    def delta(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The change itself, (out, in), multiplied out in `dtype`."""
        return self.b.to(dtype) @ self.a.to(dtype)

    def padded(self, rank: int) -> "Factors":
        """The same change with zero rows and columns up to `rank`."""
        more = rank - self.rank
        if more == 0:
            return self
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        return Factors(a, torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1))


def read_factors(path: Path, lora: LoraRecord) -> dict[str, Factors]:
    """Read the (validated) weights of a plain LoRA: module name -> factors, the module's own scaling in `b`."""
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensors[name] = file.get_tensor(name).float()
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[f"{PREFIX}{module}.lora_B.weight"]
            found[module] = Factors(a, b * lora.scaling_of(module))
    return found


def as_tensors(factors: dict[str, Factors], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT file for these factors, whose configuration has to scale by one."""
    tensors = {}
    for module, pair in sorted(factors.items()):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a.to(dtype).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b.to(dtype).contiguous()
    return tensors


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: how a product is split among threads decides its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
