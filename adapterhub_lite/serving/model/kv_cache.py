"""A step's tokens, packed row by row, and the keys and values that they write and read.

A step is packed without padding, once, and shared by every layer: how its tokens map to rows of the cache and of the
LoRA bank. Neighbouring rows with as many tokens and about as long a cache are a run, which shares each call. A row
grows and leaves without touching the others. Nothing here knows of requests or models.

Layout, for each layer and for keys and values alike: one tensor

    (rows, capacity, kv_heads, head_dim)
     |     |
     |     position in the request: token t of row r lies at [r, t], written once and never moved within the row
     one row per running request; rows in use are neighbours from 0 on

so that a step stores with one `index_copy_` at `row * capacity + position`, and neighbouring rows of about one length
are one slice, attended by one call. No paging: all rows share one capacity, which doubles when a longer request is
admitted and falls back when the engine is idle. A budget in bytes bounds rows * capacity: the larger the capacity, the
fewer rows are allocated, and who does not fit waits. Memory is allocated, not cleared; the operating system commits the
pages that are written, so a short row of a large capacity costs what it uses. A masked place is multiplied by 0, and
0 * NaN is NaN: `_clean` records up to where each row is known to hold numbers, and a row is wiped only beyond that.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PretrainedConfig

FIRST_CAPACITY = 512
CLEAN_BLOCK = 256
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

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Step(
        tensor(token_ids),
        tensor(positions),
        tensor(token_rows),
        tensor(last),
        tensor(wanted),
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


@dataclass(frozen=True)
class Room:
    """A layer's keys and values (rows, capacity, kv_heads, head_dim), and where in them the tokens of a step belong.

    Places (T,) count tokens over all rows. Those of keys and values differ after an allocation that failed half-way.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_places: torch.Tensor
    value_places: torch.Tensor

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the step's keys and values (T, kv_heads, head_dim) there."""
        self.keys.view(-1, *key.shape[1:]).index_copy_(0, self.key_places, key)
        self.values.view(-1, *value.shape[1:]).index_copy_(0, self.value_places, value)


class DirectAttention(Protocol):
    """Attends for rows with few queries, where they lie in the cache."""

    def begin(self, runs: Sequence[Run]) -> list[Run]:
        """Take the runs of a step that are for it; return the others."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> None:
        """Write the results of the runs taken into out (T, heads, value_dim), from query (T, heads, head_dim)."""
        ...


class KVCache:
    """For each layer, keys and values (rows, capacity, kv_heads, head_dim), and attention over them.

    The capacity grows by doubling when a longer request is admitted, and falls back when the engine is idle. `direct`
    attends for rows with few queries, PyTorch for the others. `budget` bounds what is allocated, in bytes; `token_bytes`
    is what one token of one row takes in all layers, as far as that is known before the first write.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        direct: DirectAttention | None = None,
        token_bytes: int = 1,
    ) -> None:
        self.rows = rows
        self.budget: int | None = None
        self._token_bytes = token_bytes
        self._held = rows
        self._direct = direct
        self._runs: list[Run] = []
        self.capacity = FIRST_CAPACITY
        self.device = device
        # Made at the first write of a layer, which knows heads and dtype; models may differ from layer to layer.
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers
        # Up to here a row's memory is known to hold numbers: masked places are multiplied by 0, and 0 * NaN is NaN.
        self._clean = [0] * rows
        self._step: Step | None = None
        # By capacity, in which stores may differ.
        self._flat: dict[int, torch.Tensor] = {}
        # By the run's first token.
        self._masks: dict[tuple[int, int | None, torch.dtype], torch.Tensor] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row takes, keys and values of all layers."""
        pairs = [(k, v) for k, v in zip(self._keys, self._values, strict=True) if k is not None and v is not None]
        if not pairs:
            return self._token_bytes
        found = sum(t[0, 0].numel() * t.element_size() for pair in pairs for t in pair)
        return found * len(self._keys) // len(pairs)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(t.nbytes for store in (self._keys, self._values) for t in store if t is not None)

    @property
    def allocated(self) -> tuple[int, int]:
        """For how many rows of how many tokens there is memory now."""
        return self._held, self.capacity

    def most_rows(self, length: int) -> int:
        """How many rows of at most `length` tokens fit into the budget."""
        if self.budget is None:
            return self.rows
        return min(self.rows, self._places() // self._capacity_for(length))

    def _places(self) -> int:
        """Tokens that fit into the budget, with one layer held twice while it grows."""
        assert self.budget is not None
        layers = len(self._keys)
        return self.budget * layers // ((layers + 1) * self.token_bytes)

    def _capacity_for(self, length: int) -> int:
        """The capacity for rows of `length` tokens: doubled from the first, or just enough where only that fits."""
        capacity = FIRST_CAPACITY
        while capacity < length:
            capacity *= 2
        return capacity if self.budget is None or capacity <= self._places() else max(length, self._places())

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens, the longest that there are or will be.

        A capacity that leaves fewer rows than there could be shrinks when it is not needed any more. When an allocation
        fails, what is in the rows stays as it is.
        """
        capacity = self._capacity_for(length)
        if capacity > self.capacity or (capacity < self.capacity and self._held < self.rows):
            self._resize(capacity, self.most_rows(length))

    def _resize(self, capacity: int, rows: int) -> None:
        rows = max(rows, 1)
        # Until all layers have the new shape, only what both shapes have is there.
        self.capacity, self._held = min(capacity, self.capacity), min(rows, self._held)
        self._clean = [min(clean, self.capacity) if row < self._held else 0 for row, clean in enumerate(self._clean)]
        keep = max(self._clean)
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                if old is not None:
                    fresh = old.new_empty(rows, capacity, *old.shape[2:])
                    fresh[: self._held, :keep] = old[: self._held, :keep]
                    store[layer] = fresh
        self.capacity, self._held = capacity, rows

    def shrink(self) -> None:
        """Give back what a long request needed. Only when no row is in use."""
        rows = max(1, self.most_rows(FIRST_CAPACITY))
        if (self.capacity, self._held) != (FIRST_CAPACITY, rows):
            self._keys = [None] * len(self._keys)
            self._values = [None] * len(self._values)
            self.capacity, self._held = FIRST_CAPACITY, rows
            self._clean = [0] * self.rows

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        for store in (self._keys, self._values):
            for tensor in store:
                if tensor is not None:
                    tensor[target, :length] = tensor[source, :length]
        self._clean[target] = max(self._clean[target], length)

    def spoil(self, row: int) -> None:
        """Trust nothing in a row: what ended there may have left numbers that are not finite."""
        self._clean[row] = 0

    def begin(self, step: Step) -> None:
        """Fix the step that the following `attend` calls belong to."""
        self._step = step
        self._flat = {}
        self._masks = {}
        self._runs = list(step.runs) if self._direct is None else self._direct.begin(step.runs)
        for run in step.runs:
            for row in range(run.rows.start, run.rows.stop):
                if self._clean[row] < run.kv_length:
                    self._wipe(row, run.kv_length)

    def _wipe(self, row: int, length: int) -> None:
        """Zero a row from where it is known to be clean to a little beyond `length`."""
        end = min(self.capacity, -(-length // CLEAN_BLOCK) * CLEAN_BLOCK)
        for store in (self._keys, self._values):
            for tensor in store:
                if tensor is not None:
                    tensor[row, self._clean[row] : end].zero_()
        self._clean[row] = end

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None = None,
        *,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store key and value (T, kv_heads, head_dim) and attend with query (T, heads, head_dim).

        Returns (T, heads, head_dim). Each row sees its own tokens up to the query's position, and of those only the
        last `window` where one is given. `softcap` c makes a score s into c tanh(s / c) (Gemma 2, arXiv:2408.00118);
        `sinks` (heads,) are scores that take part in the softmax and have no value (gpt-oss).
        """
        room = self.room(layer, key.shape[1:], value.shape[1:], key.dtype)
        room.store(key, value)
        return self.look(query, room, scaling, window, softcap=softcap, sinks=sinks)

    def look(
        self,
        query: torch.Tensor,
        room: Room,
        scaling: float | None,
        window: int | None = None,
        *,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend as `attend` does, with keys and values that have been stored."""
        step, keys, values = self._step, room.keys, room.values
        assert step is not None, "begin() was not called"
        out = torch.empty(query.shape[0], query.shape[1], values.shape[3], dtype=query.dtype, device=query.device)
        plain = softcap is None and sinks is None
        if self._direct is not None and plain:
            self._direct.attend(query, keys, values, out, scaling, window)
        kv_heads = keys.shape[2]
        for run in self._runs if plain else step.runs:
            n, length = run.count, run.query_length
            # -> (n, kv, group * q, d): heads that share keys become more queries, and no key is repeated
            q = query[run.tokens].view(n, length, kv_heads, -1, query.shape[2]).permute(0, 2, 3, 1, 4)
            group = q.shape[2]
            q = q.reshape(n, kv_heads, group * length, query.shape[2])
            k, v = (store[run.rows, : run.kv_length].transpose(1, 2) for store in (keys, values))
            mask = self._mask(run, group, window, query)
            if plain:
                got = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            else:
                got = capped_attention(q, k, v, mask, scaling, softcap, sinks)
            back = got.view(n, kv_heads, group, length, -1).permute(0, 3, 1, 2, 4)
            out[run.tokens].view(n, length, kv_heads, group, -1).copy_(back)
        return out

    def room(self, layer: int, key_shape: Sequence[int], value_shape: Sequence[int], dtype: torch.dtype) -> Room:
        """Where a layer's keys and values of this step belong; the shapes are (kv_heads, head_dim) of each."""
        pair = []
        for store, shape in ((self._keys, key_shape), (self._values, value_shape)):
            held = store[layer]
            if held is None:
                # empty, not zeros: pages that no row has reached are never committed
                held = torch.empty(self._held, self.capacity, *shape, dtype=dtype, device=self.device)
                for row, clean in enumerate(self._clean[: self._held]):
                    held[row, :clean].zero_()
                store[layer] = held
            pair.append(held)
        return Room(pair[0], pair[1], *map(self._places_in, pair))

    def _places_in(self, held: torch.Tensor) -> torch.Tensor:
        """Where the tokens of this step belong, as `Room` counts."""
        capacity = held.shape[1]
        if capacity not in self._flat:
            assert self._step is not None
            self._flat[capacity] = self._step.token_rows * capacity + self._step.positions
        return self._flat[capacity]

    def _mask(self, run: Run, group: int, window: int | None, query: torch.Tensor) -> torch.Tensor:
        """Additive mask (n, 1, group * q, kv): -inf where a query must not look. Shared by the layers of a step."""
        found = self._masks.get((run.tokens.start, window, query.dtype))
        if found is None:
            kv = torch.arange(run.kv_length, device=query.device)
            starts = torch.tensor(run.starts, device=query.device)
            at = starts[:, None] + torch.arange(run.query_length, device=query.device)
            hidden = kv > at[:, :, None]
            if window is not None:
                hidden |= kv <= at[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
            found = mask[:, None].repeat(1, 1, group, 1)
            self._masks[run.tokens.start, window, query.dtype] = found
        return found


def capped_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft caps or sinks, which PyTorch's own has not; (n, kv_heads, group * q, head_dim) as query."""
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values
    n, kv_heads, queries, _ = query.shape
    group = sinks.shape[0] // kv_heads
    # Queries lie head by head: (kv_heads, group, q).
    column = sinks.view(kv_heads, group, 1).expand(kv_heads, group, queries // group).reshape(1, kv_heads, queries, 1)
    joined = torch.cat((scores, column.to(scores.dtype).expand(n, -1, -1, -1)), dim=-1)
    return torch.softmax(joined, dim=-1, dtype=torch.float32)[..., :-1].to(query.dtype) @ values


def token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take in all layers, as far as a configuration says."""
    layers = getattr(config, "per_layer_config", None)
    if layers is not None:  # heads differ from layer to layer
        return sum(_layer_bytes(layer, dtype) for layer in layers)
    return _layer_bytes(config, dtype) * int(config.num_hidden_layers)


def _layer_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * int(kv_heads) * int(head_dim) * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate on `device` now; 1 << 40 where the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [1 << 40]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(soft - pages * resource.getpagesize())
    return max(0, min(limits))
