"""The bank: for every row of the batch the LoRA pairs it is routed to, padded to one rank, beside the frozen layers.

Row by row, never token by token; filled when the batch changes, not at every step. A row of the base holds zeros.
A row that is alone takes over the idle place that still holds its task, so that going back and forth between tasks
copies nothing. Adapters are never merged into the base.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from adapterhub_lite.serving.adapters.weights import Family, Parts
from adapterhub_lite.serving.model.packed_step import Run, Step

# A blend or a single large adapter widens every row; when nothing runs the rows go back to at most this.
USUAL_RANK = 16


class RowAdapters(Protocol):
    """Which adapters the rows are answered with."""

    def place(self, row: int, parts: Parts) -> None:
        """Route `row` to the sum of `parts`; no parts is the base."""
        ...

    def leave(self, row: int) -> None:
        """Let go of the weights of a row."""
        ...

    def shrink(self) -> None:
        """Give back what only large ranks needed. Only when no row is in use."""
        ...

    def begin(self, step: Step) -> None:
        """Compute the routing of a step, for all its layers."""
        ...


class LoraBank(RowAdapters, Protocol):
    """What a packed forward pass needs: each row's delta added to the outputs of the frozen layers."""

    def add(self, group: int, layer: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add each row's own delta to y in place, from x (T, in); return y (T, the outs of the group side by side)."""
        ...


def _key(parts: Parts) -> tuple[tuple[int, float], ...]:
    return tuple((part.weights.load_id, part.factor) for part in parts)


class GroupBank:
    """Pairs of the families that share one input, for all layers and rows.

    `a` (layers, rows, families, rank, in), so that one product serves the whole group; `b` one (layers, rows, rank,
    out) a family, with scale and factor folded in. A row without the family has zeros in `b`; `a` may hold anything.
    """

    def __init__(
        self, group: Sequence[Family], rows: int, rank: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        layers = len(group[0].paths)
        options = {"dtype": dtype, "device": device}
        self.names = tuple(family.name for family in group)
        self.a = torch.zeros(layers, rows, len(group), rank, group[0].in_features, **options)  # type: ignore[call-overload]
        self.b: list[torch.Tensor] = [
            torch.zeros(layers, rows, rank, family.out_features, **options)  # type: ignore[call-overload]
            for family in group
        ]

    def fill(self, row: int, parts: Parts) -> None:
        """Copy the sum of `parts` into a row."""
        for place, name in enumerate(self.names):
            a, b = self.a[:, row, place], self.b[place][:, row]
            at = 0
            for part in parts:
                pair = part.weights.families.get(name)
                if pair is None:
                    continue
                width = pair.a.shape[1]
                scale = pair.scale * part.factor
                if len(pair.layers) == a.shape[0]:
                    a[:, at : at + width].copy_(pair.a)
                    torch.mul(pair.b, scale, out=b[:, at : at + width])
                else:
                    layers = list(pair.layers)
                    b[:, at : at + width] = 0
                    a[layers, at : at + width] = pair.a.to(a.dtype)
                    b[layers, at : at + width] = (pair.b * scale).to(b.dtype)
                at += width
            b[:, at:] = 0


class TorchLora:
    """`rows` rows of LoRA pairs for each group of families. `dtype` is what the products are computed in.

    `allocations` counts how often memory was taken or given back.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Family]],
        rows: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._groups = groups
        self._rows: list[Parts] = [()] * rows
        self._used: set[int] = set()
        # Which place of the banks belongs to which row, and what each place holds.
        self._place = list(range(rows))
        self._held = [_key(())] * rows
        self._last_used = [0] * rows
        self._banks: list[GroupBank | None] = [None] * len(groups)
        self._dtype = dtype
        self._device = device
        self._routes: list[list[tuple[int, slice]]] = [[] for _ in groups]
        self._runs: tuple[tuple[Run, slice], ...] = ()
        self.rank = 0
        self.allocations = 0

    def place(self, row: int, parts: Parts) -> None:
        """Route `row` to the sum of `parts`; no parts is the base. What an idle place holds already is not copied."""
        self._rows[row] = parts
        self._used.add(row)
        if len(self._used) == 1:
            self._take_over(row, _key(parts))
        if self._held[self._place[row]] == _key(parts):
            return
        needed = sum(part.weights.rank for part in parts)
        if needed > self.rank:
            self._grow(1 << (needed - 1).bit_length())
        else:
            self._fill(row)

    def leave(self, row: int) -> None:
        """Let go of the weights of a row; what was copied stays until another request needs the place."""
        self._rows[row] = ()
        self._used.discard(row)

    def shrink(self) -> None:
        """Forget rows that a large rank made wide. Only when no row is in use."""
        if self.rank > USUAL_RANK:
            self.rank = 0
            self.allocations += 1
            self._banks = [None] * len(self._groups)
            self._held = [_key(())] * len(self._rows)

    def begin(self, step: Step) -> None:
        """Compute the routing of a step, for all its layers: which runs and which families have any adapter at all."""
        runs = [run for run in step.runs if any(self._rows[row] for row in range(run.rows.start, run.rows.stop))]
        if not all(self._side_by_side(run.rows) for run in runs):
            self._set_straight({*self._used, *step.rows})
        self._runs = tuple((run, self._places(run.rows)) for run in runs)
        active = {name for row in step.rows for part in self._rows[row] for name in part.weights.families}
        for group, route in zip(self._groups, self._routes, strict=True):
            route.clear()
            offset = 0
            for place, family in enumerate(group):
                if family.name in active:
                    route.append((place, slice(offset, offset + family.out_features)))
                offset += family.out_features

    def line_up(self, rows: slice) -> int | None:
        """The first of the places of neighbouring rows, which follow each other then; None: none has an adapter."""
        if not any(self._rows[rows]):
            return None
        if not self._side_by_side(rows):
            self._set_straight({*self._used, *range(rows.start, rows.stop)})
        return self._place[rows.start]

    def begin_places(self, first: int | None, count: int) -> None:
        """The following calls are of `count` tokens, one for each place from `first` on, with all pairs that there are.

        `first` None is for the base alone. What a place holds may change between two calls, where it lies may not.
        """
        self._runs = ()
        for route in self._routes:
            route.clear()
        if first is None:
            return
        whole = slice(0, count)
        self._runs = ((Run(whole, whole, 1, 1, (0,) * count), slice(first, first + count)),)
        for group, route, bank in zip(self._groups, self._routes, self._banks, strict=True):
            offset = 0
            for place, family in enumerate(group if bank is not None else ()):
                route.append((place, slice(offset, offset + family.out_features)))
                offset += family.out_features

    def add(self, group: int, layer: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add each row's own delta to y in place, from x (T, in); return y (T, the outs of the group side by side)."""
        routes = self._routes[group]
        bank = self._banks[group]
        if not routes or bank is None:
            return y
        a = bank.a[layer]
        for run, places in self._runs:
            n, length = run.count, run.query_length
            inputs = x[run.tokens].to(self._dtype).view(n, length, -1)
            down = torch.bmm(inputs, a[places].flatten(1, 2).transpose(1, 2))
            target = y[run.tokens].view(n, length, -1)
            for place, columns in routes:
                own = down[:, :, place * self.rank : (place + 1) * self.rank]
                target[:, :, columns].add_(torch.bmm(own, bank.b[place][layer, places]))
        return y

    def _take_over(self, row: int, key: tuple[tuple[int, float], ...]) -> None:
        """Exchange the place of the only row in use for the one that holds `key`, else for the longest unused one."""
        places = range(len(self._held))
        place = min(places, key=lambda at: (self._held[at] != key, self._last_used[at]))
        other = self._place.index(place)
        self._place[other], self._place[row] = self._place[row], place
        self._last_used[place] = max(self._last_used) + 1

    def _places(self, rows: slice) -> slice:
        first = self._place[rows.start]
        return slice(first, first + rows.stop - rows.start)

    def _side_by_side(self, rows: slice) -> bool:
        """Whether the places of neighbouring rows follow each other, so that one slice of the bank serves them."""
        places = self._places(rows)
        return self._place[rows] == list(range(places.start, places.stop))

    def _set_straight(self, rows: set[int]) -> None:
        """Give each row its own place again, and fill those that held another row's task."""
        self._place = list(range(len(self._rows)))
        for row in rows:
            if self._held[row] != _key(self._rows[row]):
                self._fill(row)

    def _grow(self, rank: int) -> None:
        self.rank = rank
        self.allocations += 1
        self._banks = [None] * len(self._groups)
        self._held = [_key(())] * len(self._rows)
        for row, parts in enumerate(self._rows):
            if parts:
                self._fill(row)

    def _fill(self, row: int) -> None:
        parts = self._rows[row]
        wanted = {name for part in parts for name in part.weights.families}
        for number, group in enumerate(self._groups):
            bank = self._banks[number]
            if bank is None and any(family.name in wanted for family in group):
                self.allocations += 1
                bank = GroupBank(group, len(self._rows), self.rank, self._dtype, self._device)
                self._banks[number] = bank
            if bank is not None:
                bank.fill(self._place[row], parts)
        self._held[self._place[row]] = _key(parts)
