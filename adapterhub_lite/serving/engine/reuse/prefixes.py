"""Prefixes are computed once: a request takes over the keys and values that another one has of the same beginning.

Keys and values of a token depend on the tokens before it and on the adapter, on nothing else. So a request that is given
a row looks for the longest beginning of its prompt that somebody holds, of the same tenant and the same load of the same
adapter: what an ended request left, which is kept as long as nobody needs its memory, or a request that runs, whose part is
copied. Where that one is still reading what both begin with, the later request waits for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub_lite.errors import ResourceError
from adapterhub_lite.serving.engine.sequence import GenerationSequence
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.cache.regions import Region
from adapterhub_lite.serving.model.runner import ModelRunner

# Fewer tokens are read again as quickly as they are copied.
SHORTEST = 16

Key = tuple[str, tuple[tuple[int, float], ...]]


@dataclass(frozen=True)
class Held:
    """What an ended request left: whose it is, its tokens, and where their keys and values lie."""

    key: Key
    tokens: list[int]
    region: Region


def key_of(sequence: GenerationSequence) -> Key:
    """Whose keys and values a sequence may take over: `load_id` is fresh for each load of an adapter."""
    parts = sequence.route.parts
    return sequence.request.tenant, tuple((part.weights.load_id, part.factor) for part in parts)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


class Prefixes:
    """What was kept of ended requests, and who waits for whom. Only the engine's thread uses it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._cache: KVCache | None = runner.shared_cache
        self._held: list[Held] = []

    def keep(self, sequence: GenerationSequence) -> None:
        """A sequence leaves its row: what it computed stays as long as nobody needs its memory."""
        if self._cache is not None and sequence.computed >= SHORTEST:
            tokens = [*sequence.prompt_ids, *sequence.output][: sequence.computed]
            region = self._cache.keep(sequence.row, len(tokens))
            self._held = [one for one in self._held if one.region.size]
            self._held.append(Held(key_of(sequence), tokens, region))

    def clear(self) -> None:
        """Nothing is held any more."""
        for held in self._held:
            if self._cache is not None and held.region.size:
                self._cache.drop(held.region)
        self._held.clear()

    def take_over(self, sequence: GenerationSequence, running: Sequence[GenerationSequence]) -> None:
        """Reserve the memory of the row that a sequence was just given, with what others have of its prompt.

        Where one of them is still reading that, it is noted whom the sequence waits for. Raises as `KVCache.reserve` does.
        """
        cache = self._cache
        if cache is None:
            return
        held, leader, common = None, None, SHORTEST - 1
        if sequence.prompt_logprobs is None:  # else the logits of every token are wanted
            held, common = self._held_by(sequence, common)
            leader, common = self._read_by(sequence, running, common)
        if leader is not None:
            cache.reserve(sequence.row, sequence.need)
            sequence.leader, sequence.common = leader, common
            self.follow(sequence, running)
        elif held is None:
            cache.reserve(sequence.row, sequence.need)
        elif common == len(held.tokens) or common == len(sequence.prompt_ids) - 1:
            self._go_on(sequence, held, common)
        else:
            cache.use(held.region)
            cache.reserve(sequence.row, sequence.need)
            if held.region.size:  # else memory was too short to keep it
                self._copy(held.region, sequence, common)

    def _held_by(self, sequence: GenerationSequence, common: int) -> tuple[Held | None, int]:
        """What has the longest beginning of the prompt, longer than `common`, of what was kept; and how long that is."""
        found, key, most = (
            None,
            key_of(sequence),
            len(sequence.prompt_ids) - 1,
        )  # the logits of the last token are wanted
        for held in self._held:
            if held.region.size and held.key == key:
                length = min(most, shared(sequence.prompt_ids, held.tokens))
                if length > common:
                    found, common = held, length
        return found, common

    def _read_by(
        self, sequence: GenerationSequence, running: Sequence[GenerationSequence], common: int
    ) -> tuple[GenerationSequence | None, int]:
        """The same of those that run."""
        found, key, most = None, key_of(sequence), len(sequence.prompt_ids) - 1
        for other in running:
            # Earlier ones only, so that nobody waits for whom waits for it; this one may have none yet.
            earlier = 0 < other.admitted < (sequence.admitted or math.inf)
            if other is not sequence and earlier and key_of(other) == key:
                # Paths of labels come and go after a prompt.
                tokens = other.prompt_ids if other.labels is not None else [*other.prompt_ids, *other.output]
                length = min(most, shared(sequence.prompt_ids, tokens))
                if length > common:
                    found, common = other, length
        return found, common

    def _go_on(self, sequence: GenerationSequence, held: Held, common: int) -> None:
        """A conversation goes on where its last answer ended."""
        assert self._cache is not None
        self._held.remove(held)
        self._cache.adopt(held.region, sequence.row, common)
        try:
            self._cache.reserve(sequence.row, sequence.need)
        except ResourceError:
            # Both would have to be held for a moment.
            self._cache.leave(sequence.row)
            self._cache.reserve(sequence.row, sequence.need)
        else:
            sequence.computed = sequence.cached = common

    def follow(self, sequence: GenerationSequence, running: Sequence[GenerationSequence]) -> None:
        """Take over what a sequence waits for, when its leader has read it; look again where that one has ended."""
        leader = sequence.leader
        if leader is None:
            return
        if leader.ended:
            sequence.leader = None
            self.take_over(sequence, running)
        elif leader.computed >= sequence.common:
            assert self._cache is not None
            sequence.leader = None
            self._copy(self._cache.region(leader.row), sequence, sequence.common)

    def _copy(self, source: Region, sequence: GenerationSequence, tokens: int) -> None:
        assert self._cache is not None
        self._cache.take_over(source, sequence.row, tokens)
        sequence.computed = sequence.cached = tokens
