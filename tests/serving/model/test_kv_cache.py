"""Rows of their own length: whatever comes and goes, each reads what it wrote, and what fits the budget has room."""

import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapterhub_lite.errors import ResourceError
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.cache.regions import SMALLEST, Region, exact
from adapterhub_lite.serving.model.packed_step import RowSlice, pack

ROWS, LAYERS, HEADS, DIM = 4, 2, 1, 2
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4
NEEDS = st.integers(1, 300) | st.integers(1, 2500)


class Rows(RuleBasedStateMachine):
    """A cache beside what was written into it: for each row the numbers of its tokens, in order."""

    @initialize(budget=st.sampled_from([None, 700, 1500, 4000]), masks=st.booleans())
    def make(self, budget: int | None, masks: bool) -> None:
        self.masks = masks
        self.cache = KVCache(LAYERS, ROWS, token_bytes=TOKEN_BYTES)
        if budget is not None:
            self.cache.budget = budget * TOKEN_BYTES
            self.cache.shrink()
        self.needs: dict[int, int] = {}
        self.written: dict[int, list[float]] = {}
        self.kept: list[tuple[Region, list[float]]] = []
        self.number = 0.0

    @rule(need=NEEDS)
    def admit(self, need: int) -> None:
        row = next((row for row in range(ROWS) if row not in self.needs), None)
        if row is None or not self.cache.fits([*self.needs.values(), need]):
            return
        self.cache.reserve(row, need)  # what fits has room
        self.needs[row], self.written[row] = need, []

    @rule(which=st.integers(0, ROWS - 1), share=st.floats(0.05, 1.0))
    def write(self, which: int, share: float) -> None:
        slices = []
        for row, need in sorted(self.needs.items()):
            start = len(self.written[row])
            count = int((need - start) * share)
            if count and (row - which) % 2:
                slices.append(RowSlice(row, start, [1] * count))
        if not slices:
            return
        self.cache.begin(pack(slices), masks=self.masks)
        new = []
        for part in slices:
            own = [self.number + i for i in range(len(part.token_ids))]
            self.number += len(own)
            self.written[part.row] += own
            new += own
        key = torch.tensor(new)[:, None, None].expand(-1, HEADS, DIM).contiguous()
        for layer in range(LAYERS):
            room = self.cache.room(layer, (HEADS, DIM), (HEADS, DIM), torch.float32)
            room.store(key + layer, -key - layer)

    @rule(row=st.integers(0, ROWS - 1), keep=st.booleans(), part=st.floats(0.1, 1.0))
    def end(self, row: int, keep: bool, part: float) -> None:
        if row not in self.needs:
            return
        written = self.written.pop(row)
        del self.needs[row]
        length = int(len(written) * part)
        if keep and length:
            self.kept.append((self.cache.keep(row, length), written[:length]))
        else:
            self.cache.leave(row)

    @rule(which=st.integers(0, 9), need=NEEDS, copy=st.booleans())
    def go_on(self, which: int, need: int, copy: bool) -> None:
        self.kept = [one for one in self.kept if one[0].size]
        row = next((row for row in range(ROWS) if row not in self.needs), None)
        if not self.kept or row is None or not self.cache.fits([*self.needs.values(), need]):
            return
        region, tokens = self.kept[which % len(self.kept)]
        common = min(need, len(tokens))
        if copy:
            self.cache.use(region)
            self.cache.reserve(row, need)
            if region.size:
                self.cache.take_over(region, row, common)
            else:
                common = 0
        else:
            self.cache.adopt(region, row, common)
            self.kept.remove((region, tokens))
            try:
                self.cache.reserve(row, need)
            except ResourceError:
                assert self.cache.budget is not None
                common = 0
                self.cache.leave(row)
                self.cache.reserve(row, need)
        self.needs[row], self.written[row] = need, tokens[:common]

    @rule()
    def close_the_gap(self) -> None:
        hole = next((row for row in range(ROWS) if row not in self.needs), None)
        last = max(self.needs, default=-1)
        if hole is not None and hole < last:
            self.cache.move(last, hole)
            self.needs[hole], self.written[hole] = self.needs.pop(last), self.written.pop(last)

    @invariant()
    def everybody_reads_what_it_wrote(self) -> None:
        held = [(self.cache.region(row), tokens) for row, tokens in self.written.items()]
        held += [(region, tokens) for region, tokens in self.kept if region.size]
        for layer, (keys, values) in enumerate(zip(self.cache._keys, self.cache._values, strict=True)):
            for region, tokens in held:
                if keys is not None and values is not None and tokens:
                    places = slice(region.begin, region.begin + len(tokens))
                    wanted = torch.tensor(tokens)[:, None, None].expand(-1, HEADS, DIM) + layer
                    assert torch.equal(keys[places], wanted) and torch.equal(values[places], -wanted)
        spans = sorted((region.begin, region.begin + region.size) for region, _ in held)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))

    @invariant()
    def the_budget_holds(self) -> None:
        if self.cache.budget is not None:
            assert self.cache.nbytes <= self.cache.budget


Rows.TestCase.settings = settings(deadline=None, stateful_step_count=40)
TestRows = Rows.TestCase


def test_one_long_row_does_not_make_the_others_long() -> None:
    cache = KVCache(1, 16, token_bytes=8)
    for row in range(15):
        cache.reserve(row, 100)
    cache.reserve(15, 30_000)
    assert cache.places <= 2 * (15 * SMALLEST + 32_768)
    cache.budget = 2 * 8 * (exact(30_000) + 15 * exact(100))
    assert cache.fits([30_000, *[100] * 15]) and not cache.fits([30_000, *[164] * 15])


def test_what_lies_unevenly_is_attended_as_what_lies_evenly() -> None:
    """Regions in any order and of any size, with numbers that are none in every place that nobody wrote."""
    generator = torch.Generator().manual_seed(0)
    key, query = torch.randn(4, 120, 2, 4, generator=generator), torch.randn(4, 120, 4, 4, generator=generator)
    lengths = [9, 9, 100, 70]

    def answers(order: list[int], needs: list[int], budget: int | None) -> torch.Tensor:
        cache = KVCache(1, 6, token_bytes=2 * 2 * 4 * 4)
        if budget is not None:
            cache.budget = budget
            cache.shrink()
        for row in order:
            cache.reserve(row, needs[row])
        held = cache.room(0, (2, 4), (2, 4), torch.float32)
        held.keys.fill_(torch.nan)
        held.values.fill_(torch.nan)
        found = []
        starts = [0] * 4
        for counts in ([length - 3 for length in lengths], [1] * 4, [2] * 4):
            slices = [RowSlice(row, starts[row], [1] * counts[row]) for row in range(4)]
            cache.begin(pack(slices))
            parts = [slice(part.start, part.start + len(part.token_ids)) for part in slices]
            flat = [torch.cat([one[row, part] for row, part in enumerate(parts)]) for one in (query, key)]
            found.append(cache.attend(0, flat[0], flat[1], flat[1].flip(-1), None))
            starts = [part.stop for part in parts]
        return torch.cat(found)

    even = answers([0, 1, 2, 3], lengths, None)
    assert even.isfinite().all()
    for order, needs in (
        ([2, 0, 3, 1], [9, 600, 100, 1200]),
        ([0, 1, 2, 3], [9, 600, 100, 70]),
        ([3, 2, 1, 0], lengths),
    ):
        torch.testing.assert_close(answers(order, needs, None), even)
    # Every region is cut to its need; rows 4 and 5 lie between and have written nothing.
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [0, 4, 1, 5, 2, 3]):
        torch.testing.assert_close(answers(order, [*lengths, 9, 9], 2 * 550 * 64), even)
