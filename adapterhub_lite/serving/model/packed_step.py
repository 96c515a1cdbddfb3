"""A step's tokens, packed row by row without padding, once, and shared by every layer.

It says how tokens map to rows of the cache and of the LoRA bank. Neighbouring rows with as many tokens and about as long a cache
are a run, which shares each call. Nothing here knows of requests, models or memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows whose caches differ less than this are read together; padding a short row to a long one costs more than a call.
LENGTH_BUCKET = 256


@dataclass(frozen=True)
class RowSlice:
    """Tokens that one row computes in a step; `start` tokens are in its cache already. The logits after the last
    `logits` of them are wanted.
    """

    row: int
    start: int
    token_ids: Sequence[int]
    logits: int = 1


@dataclass(frozen=True)
class Run:
    """Neighbouring rows that compute the same number of tokens: one batched call per layer. Ends are exclusive."""

    tokens: slice
    rows: slice
    query_length: int
    kv_length: int
    starts: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Step:
    """A packed step of T tokens. `last` holds the index of each row's last token, in the order of `rows`; `wanted` the
    indices of the tokens whose logits are wanted, `counts` of them per row, that row's last ones.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    token_rows: torch.Tensor
    last: torch.Tensor
    wanted: torch.Tensor
    counts: tuple[int, ...]
    rows: tuple[int, ...]
    runs: tuple[Run, ...]


def pack(slices: Sequence[RowSlice], device: torch.device | str = "cpu") -> Step:
    """Pack the slices, which must be in ascending order of row, into a step."""
    token_ids: list[int] = []
    positions: list[int] = []
    token_rows: list[int] = []
    last: list[int] = []
    wanted: list[int] = []
    for part in slices:
        token_ids.extend(part.token_ids)
        positions.extend(range(part.start, part.start + len(part.token_ids)))
        token_rows.extend([part.row] * len(part.token_ids))
        last.append(len(token_ids) - 1)
        wanted.extend(range(len(token_ids) - part.logits, len(token_ids)))
    parts = (token_ids, positions, token_rows, last, wanted)
    # One copy to the device.
    whole = torch.tensor([value for part in parts for value in part], dtype=torch.long, device=device)
    ids, at, of_rows, ends, asked = whole.split([len(part) for part in parts])
    return Step(
        ids,
        at,
        of_rows,
        ends,
        asked,
        tuple(part.logits for part in slices),
        tuple(part.row for part in slices),
        group_runs(slices),
    )


def unpack(step: Step) -> list[RowSlice]:
    """The slices that a step was packed from."""
    slices, begin = [], 0
    ids, positions = step.token_ids.tolist(), step.positions.tolist()
    for row, last, count in zip(step.rows, step.last.tolist(), step.counts, strict=True):
        slices.append(RowSlice(row, positions[begin], ids[begin : last + 1], count))
        begin = last + 1
    return slices


def _bucket(length: int) -> int:
    """The power of two, at least `LENGTH_BUCKET`, that holds `length`: rows of one bucket share a call."""
    return max(LENGTH_BUCKET, 1 << (length - 1).bit_length())


def group_runs(slices: Sequence[RowSlice]) -> tuple[Run, ...]:
    """The neighbouring rows that can share a call: as many tokens each, caches of about one length."""
    groups: list[list[RowSlice]] = []
    for part in slices:
        before = groups[-1][-1] if groups else None
        if (
            before is not None
            and part.row == before.row + 1
            and len(part.token_ids) == len(before.token_ids)
            and _bucket(part.start + len(part.token_ids)) == _bucket(before.start + len(before.token_ids))
        ):
            groups[-1].append(part)
        else:
            groups.append([part])
    runs, offset = [], 0
    for group in groups:
        query = len(group[0].token_ids)
        longest = max(part.start for part in group) + query
        tokens = slice(offset, offset + query * len(group))
        rows = slice(group[0].row, group[-1].row + 1)
        runs.append(Run(tokens, rows, query, longest, tuple(part.start for part in group)))
        offset = tokens.stop
    return tuple(runs)
