"""Neighbouring rows of a step that lie evenly in the cache, so that they are one view of it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from adapterhub_lite.serving.model.packed_step import Run


@dataclass(frozen=True)
class Look:
    """A run whose rows lie evenly: the first at `begin`, each `spacing` places behind the one before it."""

    run: Run
    begin: int
    spacing: int

    def view(self, store: torch.Tensor) -> torch.Tensor:
        """The rows' part (n, kv_length, kv_heads, dim) of a layer's keys or values."""
        shape = (self.run.count, self.run.kv_length, *store.shape[1:])
        place = store.stride(0)
        return store.as_strided(shape, (self.spacing * place, *store.stride()), self.begin * place)

    def equally_long(self) -> Iterator["Look"]:
        """Neighbours of one length, each read no further than that."""
        run, at = self.run, 0
        for start, equal in itertools.groupby(run.starts):
            end = at + len(list(equal))
            tokens = slice(run.tokens.start + at * run.query_length, run.tokens.start + end * run.query_length)
            rows = slice(run.rows.start + at, run.rows.start + end)
            length = start + run.query_length
            part = replace(run, tokens=tokens, rows=rows, kv_length=length, starts=run.starts[at:end])
            yield Look(part, self.begin + at * self.spacing, self.spacing)
            at = end
