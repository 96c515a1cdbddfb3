"""Attention of rows that compute one token each, over keys that are gathered by their places.

Every shape is the number of rows and a bound on their lengths; where the rows lie and how long they are is read from
tensors on the device. So the same operations serve another step, which is what a recorded graph needs. The price over a
view of the cache: keys and values of the rows are copied once per layer.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GatheredRows:
    """For n rows, the position (n,) of each one's token, and the places (n, keys) of the tokens that it may see.

    Beyond its own position a row has its first place, which holds numbers, and is masked: nothing has to be wiped.
    """

    positions: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, begins: torch.Tensor, positions: torch.Tensor, keys: int) -> "GatheredRows":
        """For rows whose regions begin at `begins` (n,); none has more than `keys` tokens, this one included."""
        at = torch.arange(keys, device=begins.device)
        return cls(positions, begins[:, None] + at * (at <= positions[:, None]))

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive (n, 1, 1, keys), for all heads: -inf where a row must not look."""
        at = torch.arange(self.places.shape[1], device=self.positions.device)
        hidden = at > self.positions[:, None]
        if window is not None:
            hidden = hidden | (at <= self.positions[:, None] - window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return mask[:, None, None]

    def held(self, store: torch.Tensor) -> torch.Tensor:
        """The rows' part of a layer's keys or values (places, kv_heads, dim): (n, kv_heads, keys, dim)."""
        shape = (*self.places.shape, *store.shape[1:])
        return store.index_select(0, self.places.view(-1)).view(shape).transpose(1, 2)
