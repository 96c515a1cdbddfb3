"""The bank: for every row of the batch the LoRA pairs it is routed to, padded to one rank, beside the frozen layers.

Row by row, never token by token; filled when the batch changes, not at every step. A row of the base holds zeros.
Adapters are never merged into the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterhub_lite.serving.packing import Run, Step
from adapterhub_lite.serving.weights import AdapterWeights, Family


@dataclass(frozen=True)
class Part:
    """An adapter's weights with the factor on its delta; several of them make a blend."""

    weights: AdapterWeights
    factor: float = 1.0


Parts = tuple[Part, ...]


def _key(parts: Parts) -> tuple[tuple[int, float], ...]:
    return tuple((part.weights.load_id, part.factor) for part in parts)


@dataclass
class _FamilyBank:
    a: torch.Tensor  # (layers, rows, rank, in)
    b: torch.Tensor  # (layers, rows, rank, out), scale and factor folded in
    filled: list[bool]


class RowBank:
    """`rows` rows of LoRA pairs for each family. `dtype` is what the products are computed in."""

    def __init__(
        self, families: Sequence[Family], rows: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._families = {family.name: family for family in families}
        self._rows: list[Parts] = [()] * rows
        self._held = [_key(())] * rows
        self._banks: dict[str, _FamilyBank] = {}
        self._dtype = dtype
        self._device = device
        self._active: frozenset[str] = frozenset()
        self._runs: tuple[Run, ...] = ()
        self.rank = 0

    def place(self, row: int, parts: Parts) -> None:
        """Route `row` to the sum of `parts`; no parts is the base. What the row holds already is not copied again."""
        self._rows[row] = parts
        if self._held[row] == _key(parts):
            return
        needed = sum(part.weights.rank for part in parts)
        if needed > self.rank:
            self._grow(1 << (needed - 1).bit_length())
        else:
            self._fill(row)

    def leave(self, row: int) -> None:
        """Let go of the weights of a row; what was copied stays until another request needs the row."""
        self._rows[row] = ()

    def begin(self, step: Step) -> None:
        """Compute the routing of a step: which families and which runs have any adapter at all."""
        self._active = frozenset(
            name for row in step.rows for part in self._rows[row] for name in part.weights.families
        )
        self._runs = tuple(
            run for run in step.runs if any(self._rows[row] for row in range(run.rows.start, run.rows.stop))
        )

    def add(self, family: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add each row's own delta to y (T, out) in place, from x (T, in); return y."""
        if family not in self._active:
            return y
        bank = self._banks[family]
        a, b = bank.a[layer], bank.b[layer]
        for run in self._runs:
            n, length = run.count, run.query_length
            inputs = x[run.tokens].view(n, length, -1).to(self._dtype)
            down = torch.bmm(inputs, a[run.rows].transpose(1, 2))
            y[run.tokens].view(n, length, -1).add_(torch.bmm(down, b[run.rows]))
        return y

    def clear(self) -> None:
        """Route every row to the base and give the memory back."""
        self._rows = [()] * len(self._rows)
        self._held = [_key(())] * len(self._rows)
        self._banks = {}
        self._active, self._runs, self.rank = frozenset(), (), 0

    def _grow(self, rank: int) -> None:
        self.rank = rank
        self._banks = {}
        self._held = [_key(())] * len(self._rows)
        for row, parts in enumerate(self._rows):
            if parts:
                self._fill(row)

    def _fill(self, row: int) -> None:
        parts = self._rows[row]
        wanted = {name for part in parts for name in part.weights.families}
        for name in wanted - self._banks.keys():
            self._banks[name] = self._allocate(self._families[name])
        for name, bank in self._banks.items():
            if name in wanted:
                self._fill_family(bank, row, [p for p in parts if name in p.weights.families], name)
            elif bank.filled[row]:
                bank.b[:, row].zero_()
            bank.filled[row] = name in wanted
        self._held[row] = _key(parts)

    def _allocate(self, family: Family) -> _FamilyBank:
        shape = (len(family.paths), len(self._rows), self.rank)
        a = torch.zeros(*shape, family.in_features, dtype=self._dtype, device=self._device)
        b = torch.zeros(*shape, family.out_features, dtype=self._dtype, device=self._device)
        return _FamilyBank(a, b, [False] * len(self._rows))

    def _fill_family(self, bank: _FamilyBank, row: int, parts: list[Part], name: str) -> None:
        whole = len(parts) == 1 and len(parts[0].weights.families[name].layers) == bank.a.shape[0]
        if not whole:
            bank.b[:, row].zero_()
        at = 0
        for part in parts:
            pair = part.weights.families[name]
            width = pair.a.shape[1]
            layers = slice(None) if len(pair.layers) == bank.a.shape[0] else list(pair.layers)
            bank.a[layers, row, at : at + width] = pair.a.to(self._dtype)
            bank.b[layers, row, at : at + width] = (pair.b * (pair.scale * part.factor)).to(self._dtype)
            at += width
        bank.b[:, row, at:].zero_()
