"""The keys and values that a step writes and reads, and attention over them.

A row grows and leaves without touching the others, and takes what its own length needs. Nothing here knows of requests or models.

Layout, for each layer and for keys and values alike: one tensor

    (places, kv_heads, head_dim)

in which each row has a region of its own length (`regions`): token t of a row lies at its region's begin + t, written once. So a
step stores with one `index_copy_`. Regions of up to twice the length that was asked for, powers of two, so that neighbouring
rows of about one length lie evenly and are one strided view, attended by one call. What an ended row held can be kept as long as
nobody needs its places, and a row goes on in another one's region without a copy.

A budget in bytes bounds the places. Where a row fits only in pieces of it, what was kept is let go of, the longest unused first;
then every region is cut to what it needs and all move together. So rows whose needs fit the budget always have room. Memory is
allocated, not cleared; the operating system commits the pages that are written. A masked place is multiplied by 0, and 0 * NaN
is NaN: `Region.clean` records up to where a region is known to hold numbers, and it is wiped only beyond that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from adapterhub_lite.errors import ResourceError
from adapterhub_lite.serving.model.cache.attention import attention_by_heads, capped_attention
from adapterhub_lite.serving.model.cache.gathered import GatheredRows
from adapterhub_lite.serving.model.cache.looks import Look
from adapterhub_lite.serving.model.cache.regions import SMALLEST, Region, Regions, comfortable, exact
from adapterhub_lite.serving.model.packed_step import Run, Step

CLEAN_BLOCK = 256


@dataclass(frozen=True)
class Room:
    """A layer's keys and values (places, kv_heads, head_dim), and the places (T,) where the tokens of a step belong."""

    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the step's keys and values (T, kv_heads, head_dim) there."""
        self.keys.index_copy_(0, self.places, key)
        self.values.index_copy_(0, self.places, value)


class DirectAttention(Protocol):
    """Attends for rows with few queries, where they lie in the cache."""

    def begin(self, looks: Sequence[Look]) -> list[Look]:
        """Take those of a step that are for it; return the others."""
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
        """Write the results of what was taken into out (T, heads, value_dim), from query (T, heads, head_dim)."""
        ...


class KVCache:
    """For each layer, keys and values of at most `rows` rows, each as long as it needs, and attention over them.

    `direct` attends for rows with few queries, PyTorch for the others; with `whole_heads` it is given prompts head by head, as the
    kernels of accelerators want them. `budget` bounds what is allocated, in bytes; `token_bytes` is what one token of one
    row takes in all layers, as far as that is known before the first write. With `spare_place` there is one place behind
    all regions, for what rows that only fill up a recorded step write. `allocations` counts how often memory was taken or
    given back: what was recorded for another count writes where nobody reads.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        direct: DirectAttention | None = None,
        token_bytes: int = 1,
        whole_heads: bool = False,
        spare_place: bool = False,
    ) -> None:
        self.rows = rows
        self.allocations = 0
        self._spare = int(spare_place)
        self._whole_heads = whole_heads
        self.budget: int | None = None
        self._token_bytes = token_bytes
        self._direct = direct
        self.device = device
        # Made at the first write of a layer, which knows heads and dtype; models may differ from layer to layer.
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers
        self._regions = Regions(rows * SMALLEST)
        self._of: dict[int, Region] = {}
        # What ended rows held, the longest unused first.
        self._kept: list[Region] = []
        self._step: Step | None = None
        self._places = torch.empty(0, dtype=torch.long)
        self._looks: list[Look] = []
        self._others: list[Look] = []
        self._gathered: GatheredRows | None = None
        # By the run's first token, and how many heads share a key.
        self._masks: dict[tuple[int, int, int | None, torch.dtype], torch.Tensor] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row takes, keys and values of all layers."""
        pairs = [(k, v) for k, v in zip(self._keys, self._values, strict=True) if k is not None and v is not None]
        if not pairs:
            return self._token_bytes
        found = sum(t[0].numel() * t.element_size() for pair in pairs for t in pair)
        return found * len(self._keys) // len(pairs)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(t.nbytes for store in (self._keys, self._values) for t in store if t is not None)

    @property
    def places(self) -> int:
        """For how many tokens, of all rows together, there is memory."""
        return self._regions.places

    def _most_places(self) -> int | None:
        """Places that fit into the budget, with one layer held twice while it grows; None: no limit."""
        layers = len(self._keys)
        return None if self.budget is None else self.budget * layers // ((layers + 1) * self.token_bytes)

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether rows of so many tokens have room, all together."""
        most = self._most_places()
        return len(needs) <= self.rows and (most is None or sum(map(exact, needs)) <= most)

    def region(self, row: int) -> Region:
        """Where a row lies; it has a region from its admission or its first write until it leaves."""
        return self._of[row]

    def reserve(self, row: int, need: int) -> None:
        """Have room for `need` tokens of a row; what it holds stays.

        Raises:
            ResourceError: the rows' needs do not fit into the budget.
            Exception: what PyTorch raises where memory is short. The other rows stay as they are in any case.
        """
        held = self._of.get(row)
        if held is not None and held.size >= need:
            held.need = max(held.need, need)
            return
        fresh = self._make_room(need, new=held is None)
        if held is not None:
            self._copy(held.begin, fresh.begin, held.clean)
            fresh.clean = held.clean
            self._regions.give_back(held)
        self._of[row] = fresh

    def _make_room(self, need: int, *, new: bool) -> Region:
        regions, most = self._regions, self._most_places()
        while new and self._kept and len(self._of) + len(self._kept) >= self.rows:
            self.drop(self._kept[0])
        size = comfortable(need)
        found = regions.take(size, need)
        if found is None and (most is None or regions.places < most):
            wanted = max(2 * regions.places, regions.places + size)
            self._grow(wanted if most is None else min(wanted, most))
            found = regions.take(size, need)
        size = exact(need)
        found = found or regions.take(size, need)
        while found is None and self._kept:
            self.drop(self._kept[0])
            found = regions.take(size, need)
        if found is None:
            for source, target, places in regions.close_up():
                self._copy(source, target, places)
            found = regions.take(size, need)
        if found is None:
            raise ResourceError(f"There is no room for the keys and values of {need:,} tokens beside those of others.")
        return found

    def _grow(self, places: int) -> None:
        """Have `places`. Where the memory ends half-way, layers that have more of them already lose nothing by it."""
        self.allocations += 1
        end = self._regions.places
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                if old is not None and old.shape[0] < places + self._spare:
                    fresh = old.new_empty(places + self._spare, *old.shape[1:])
                    for region in (*self._of.values(), *self._kept):
                        used = slice(region.begin, min(end, region.begin + region.clean))
                        fresh[used] = old[used]
                    store[layer] = fresh
        self._regions.places = places

    def _copy(self, source: int, target: int, places: int) -> None:
        """Copy in every layer; the two may overlap."""
        for store in (self._keys, self._values):
            for tensor in store:
                if tensor is not None and places:
                    part = tensor[source : source + places]
                    overlap = abs(source - target) < places
                    tensor[target : target + places] = part.clone() if overlap else part

    def leave(self, row: int) -> None:
        """A row is over; its places are free."""
        region = self._of.pop(row, None)
        if region is not None:
            self._regions.give_back(region)

    def keep(self, row: int, length: int) -> Region:
        """A row is over, but what its first `length` tokens left stays, as long as nobody needs its places."""
        region = self._of.pop(row)
        region.need = length
        region.clean = min(region.clean, length)
        self._kept.append(region)
        return region

    def drop(self, region: Region) -> None:
        """Let go of what was kept."""
        self._kept.remove(region)
        self._regions.give_back(region)

    def use(self, region: Region) -> None:
        """What was kept is wanted: let go of it last."""
        self._kept.remove(region)
        self._kept.append(region)

    def adopt(self, region: Region, row: int, length: int) -> None:
        """A row goes on behind the first `length` tokens of what was kept."""
        self._kept.remove(region)
        self.leave(row)
        region.need, region.clean = length, min(region.clean, length)
        self._of[row] = region

    def take_over(self, source: Region, row: int, length: int) -> None:
        """Copy the first `length` tokens of another region to a row."""
        target = self._of[row]
        self._copy(source.begin, target.begin, length)
        target.clean = max(target.clean, length)

    def move(self, source: int, target: int) -> None:
        """Row `source` is row `target` from now on; nothing is copied."""
        self.leave(target)
        if source in self._of:
            self._of[target] = self._of.pop(source)

    def spoil(self, row: int) -> None:
        """Trust nothing in a row: what ended there may have left numbers that are not finite."""
        if row in self._of:
            self._of[row].clean = 0

    def shrink(self) -> None:
        """Give back everything. Only when no row is in use."""
        self._of.clear()
        self._kept.clear()
        most = self._most_places()
        places = self.rows * SMALLEST if most is None else min(self.rows * SMALLEST, most)
        if self._regions.places != places:
            self.allocations += 1
            self._keys = [None] * len(self._keys)
            self._values = [None] * len(self._values)
        self._regions = Regions(places)

    def begin(self, step: Step, *, masks: bool = True) -> None:
        """Fix the step that the following calls belong to.

        Without `masks` nothing is read beyond what a row has written, so nothing there needs to be a number.

        Raises:
            Exception: as `reserve` does, for a row that nobody reserved room for.
        """
        self._step, self._masks, self._gathered = step, {}, None
        self._reserve(step)
        begins = torch.tensor([self._of[row].begin if row in self._of else 0 for row in range(max(step.rows) + 1)])
        self._places = step.positions + begins.to(step.positions.device)[step.token_rows]
        if not masks:
            self._written(step)
            return
        self._looks = [look for run in step.runs for look in self._lying_evenly(run)]
        self._others = self._looks if self._direct is None else self._direct.begin(self._looks)
        for look in self._looks:
            for row in range(look.run.rows.start, look.run.rows.stop):
                if self._of[row].clean < look.run.kv_length:
                    self._wipe(self._of[row], look.run.kv_length)

    def begins(self, step: Step, rows: int) -> torch.Tensor:
        """Where the regions of a step's rows begin, for a step by `begin_gathered`; on the CPU, filled up to (rows,).

        What fills it up is the place behind all regions. Raises as `begin`.
        """
        assert self._spare, "there is no place for what fills up a step"
        self._reserve(step)
        self._written(step)
        own = [self._of[row].begin for row in step.rows]
        return torch.tensor(own + [self._regions.places] * (rows - len(own)))

    def begin_gathered(self, begins: torch.Tensor, positions: torch.Tensor, keys: int) -> None:
        """The following calls are of rows of one token each at `positions` (n,), none with more than `keys` tokens.

        Their regions begin at `begins` (n,), which has been asked for by `begins`.
        """
        self._masks = {}
        self._gathered = GatheredRows.of(begins, positions, keys)
        self._places = begins + positions

    def _reserve(self, step: Step) -> None:
        for run in step.runs:
            for row, start in zip(range(run.rows.start, run.rows.stop), run.starts, strict=True):
                self.reserve(row, start + run.query_length)

    def _written(self, step: Step) -> None:
        """Nothing is read beyond what each row writes now, or has written before."""
        for run in step.runs:
            for row, start in zip(range(run.rows.start, run.rows.stop), run.starts, strict=True):
                region = self._of[row]
                region.clean = max(region.clean, start + run.query_length)

    def _lying_evenly(self, run: Run) -> list[Look]:
        """The parts of a run whose rows lie evenly, each with room for as many tokens as the longest of its part has."""
        found: list[Look] = []
        rows = list(range(run.rows.start, run.rows.stop))
        at = 0
        while at < run.count:
            first = self._of[rows[at]]
            longest, room, spacing, end = run.starts[at] + run.query_length, first.size, 0, at + 1
            while end < run.count:
                region = self._of[rows[end]]
                step = region.begin - self._of[rows[end - 1]].begin
                most = max(longest, run.starts[end] + run.query_length)
                if step <= 0 or (spacing and step != spacing) or most > min(room, region.size):
                    break
                longest, room, spacing, end = most, min(room, region.size), step, end + 1
            tokens = slice(run.tokens.start + at * run.query_length, run.tokens.start + end * run.query_length)
            part = replace(
                run,
                tokens=tokens,
                rows=slice(rows[at], rows[end - 1] + 1),
                kv_length=longest,
                starts=run.starts[at:end],
            )
            found.append(Look(part, first.begin, spacing))
            at = end
        return found

    def _wipe(self, region: Region, length: int) -> None:
        """Zero a region from where it is known to be clean to a little beyond `length`."""
        end = min(region.size, -(-length // CLEAN_BLOCK) * CLEAN_BLOCK)
        for store in (self._keys, self._values):
            for tensor in store:
                if tensor is not None:
                    tensor[region.begin + region.clean : region.begin + end].zero_()
        region.clean = end

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
        if self._gathered is not None:
            return self._look_gathered(self._gathered, query, room, scaling, window, softcap, sinks)
        keys, values = room.keys, room.values
        assert self._step is not None, "begin() was not called"
        out = torch.empty(query.shape[0], query.shape[1], values.shape[2], dtype=query.dtype, device=query.device)
        plain = softcap is None and sinks is None
        if self._direct is not None and plain:
            self._direct.attend(query, keys, values, out, scaling, window)
        kv_heads = keys.shape[1]
        for look in self._others if plain else self._looks:
            run = look.run
            if plain and self._whole_heads and run.query_length > 1:
                if window is not None and window < run.kv_length:
                    mask = self._mask(run, 1, window, query)
                    k, v = look.view(keys), look.view(values)
                    out[run.tokens] = attention_by_heads(query[run.tokens], k, v, mask, scaling)
                    continue
                for part in look.equally_long():
                    k, v, tokens = part.view(keys), part.view(values), part.run.tokens
                    out[tokens] = attention_by_heads(query[tokens], k, v, None, scaling)
                continue
            n, length = run.count, run.query_length
            # -> (n, kv, group * q, d): heads that share keys become more queries, and no key is repeated
            q = query[run.tokens].view(n, length, kv_heads, -1, query.shape[2]).permute(0, 2, 3, 1, 4)
            group = q.shape[2]
            q = q.reshape(n, kv_heads, group * length, query.shape[2])
            k, v = (look.view(store).transpose(1, 2) for store in (keys, values))
            mask = self._mask(run, group, window, query)
            if plain:
                got = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            else:
                got = capped_attention(q, k, v, mask, scaling, softcap, sinks)
            back = got.view(n, kv_heads, group, length, -1).permute(0, 3, 1, 2, 4)
            out[run.tokens].view(n, length, kv_heads, group, -1).copy_(back)
        return out

    def _look_gathered(
        self,
        rows: GatheredRows,
        query: torch.Tensor,
        room: Room,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        n, heads, dim = query.shape
        q = query.view(n, room.keys.shape[1], -1, dim)  # heads that share a key are its queries
        key = (-1, 1, window, query.dtype)
        if key not in self._masks:
            self._masks[key] = rows.mask(window, query.dtype)
        k, v, mask = rows.held(room.keys), rows.held(room.values), self._masks[key]
        if softcap is None and sinks is None:
            got = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        else:
            got = capped_attention(q, k, v, mask, scaling, softcap, sinks)
        return got.reshape(n, heads, -1)

    def room(self, layer: int, key_shape: Sequence[int], value_shape: Sequence[int], dtype: torch.dtype) -> Room:
        """Where a layer's keys and values of this step belong; the shapes are (kv_heads, head_dim) of each."""
        pair = []
        for store, shape in ((self._keys, key_shape), (self._values, value_shape)):
            held = store[layer]
            if held is None:
                # empty, not zeros: pages that no row has reached are never committed
                self.allocations += 1
                held = torch.empty(self._regions.places + self._spare, *shape, dtype=dtype, device=self.device)
                for region in (*self._of.values(), *self._kept):
                    held[region.begin : region.begin + region.clean].zero_()
                store[layer] = held
            pair.append(held)
        return Room(pair[0], pair[1], self._places)

    def _mask(self, run: Run, group: int, window: int | None, query: torch.Tensor) -> torch.Tensor:
        """Additive mask (n, 1, group * q, kv), of a single query (n, 1, 1, kv): -inf where a query must not look.

        Shared by the layers of a step.
        """
        found = self._masks.get((run.tokens.start, group, window, query.dtype))
        if found is None:
            kv = torch.arange(run.kv_length, device=query.device)
            starts = torch.tensor(run.starts, device=query.device)
            at = starts[:, None] + torch.arange(run.query_length, device=query.device)
            hidden = kv > at[:, :, None]
            if window is not None:
                hidden |= kv <= at[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
            # A single query has one mask for all heads.
            found = mask[:, None].repeat(1, 1, group if run.query_length > 1 else 1, 1)
            self._masks[run.tokens.start, group, window, query.dtype] = found
        return found
