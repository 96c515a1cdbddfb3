"""Prefixes are computed once: a request takes over the keys and values that another one has of the same beginning.

Keys and values of a token depend on the tokens before it and on the adapter, on nothing else. So a request that is given
a row looks for the longest beginning of its prompt that another row holds, of the same tenant and the same load of the
same adapter: in the row of a request that has ended, which stays as it is until the row is needed, or of one that runs,
whose part is copied. Where that one is still reading what both begin with, the later request waits for it.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from adapterhub_lite.serving.engine.sequence import GenerationSequence
from adapterhub_lite.serving.model.runner import ModelRunner

# Fewer tokens are read again as quickly as they are copied.
SHORTEST = 16

Key = tuple[str, tuple[tuple[int, float], ...]]


@dataclass
class Held:
    """What the row of an ended request holds: its tokens, and when it ended."""

    key: Key
    tokens: list[int]
    since: int


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
    """What the rows of a runner hold, and who waits for whom. Only the engine's thread uses it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._on = runner.shares_prefixes
        self._held: dict[int, Held] = {}
        self._clock = 0

    def keep(self, sequence: GenerationSequence) -> None:
        """A sequence leaves its row: what it computed stays there until the row is needed."""
        if self._on and sequence.computed >= SHORTEST:
            self._clock += 1
            tokens = [*sequence.prompt_ids, *sequence.output][: sequence.computed]
            self._held[sequence.row] = Held(key_of(sequence), tokens, self._clock)

    def forget(self, row: int) -> None:
        """A row's content is not to be trusted."""
        self._held.pop(row, None)

    def clear(self) -> None:
        """Nothing is held any more."""
        self._held.clear()

    def make_way(self, row: int, used: Collection[int]) -> None:
        """A row is about to be written: what it holds goes to a row that is not used, or was held for longer."""
        own = self._held.pop(row, None)
        if own is None:
            return
        places = [at for at in range(self._runner.allocated[0]) if at != row and at not in used]
        place = min(places, key=lambda at: self._held[at].since if at in self._held else 0, default=None)
        if place is not None and (place not in self._held or self._held[place].since < own.since):
            self._runner.copy(row, place, len(own.tokens))
            self._held[place] = own

    def take_over(self, sequence: GenerationSequence, running: Sequence[GenerationSequence]) -> None:
        """Fill the row that a sequence was just given with what others have of its prompt, or note whom it waits for."""
        if not self._on:
            return
        # The row was granted its memory just now, and others may have lost theirs to it.
        allocated, capacity = self._runner.allocated
        self._held = {at: held for at, held in self._held.items() if at < allocated}
        for held in self._held.values():
            del held.tokens[capacity:]
        if sequence.prompt_logprobs is not None:  # wants the logits of every token
            self.make_way(sequence.row, [other.row for other in running])
            return
        row, key, prompt = sequence.row, key_of(sequence), sequence.prompt_ids
        # The last token is computed in any case: its logits are wanted.
        most = len(prompt) - 1
        source, common = row, SHORTEST - 1
        for at, held in self._held.items():
            if held.key == key and min(most, shared(prompt, held.tokens)) > common:
                source, common = at, min(most, shared(prompt, held.tokens))
        for other in running:
            # Earlier ones only, so that nobody waits for whom waits for it; this one may have none yet.
            earlier = 0 < other.admitted < (sequence.admitted or math.inf)
            if other is not sequence and earlier and key_of(other) == key:
                # Paths of labels come and go after a prompt.
                tokens = other.prompt_ids if other.labels is not None else [*other.prompt_ids, *other.output]
                found = min(most, shared(prompt, tokens))
                if found > common:
                    sequence.leader, common = other, found
        used = [other.row for other in running]
        if sequence.leader is not None:
            self.make_way(row, used)
            sequence.common = common
            self.follow(sequence, running)
        elif common < SHORTEST:
            self.make_way(row, used)
        elif source == row:
            del self._held[row]
            sequence.computed = sequence.cached = common
        else:
            self.make_way(row, [*used, source])
            self._copy(source, sequence, common)

    def follow(self, sequence: GenerationSequence, running: Sequence[GenerationSequence]) -> None:
        """Take over what a sequence waits for, when its leader has read it; look again where that one has ended."""
        leader = sequence.leader
        if leader is None:
            return
        if leader.ended:
            sequence.leader = None
            self.take_over(sequence, running)
        elif leader.computed >= sequence.common:
            sequence.leader = None
            self._copy(leader.row, sequence, sequence.common)

    def _copy(self, source: int, sequence: GenerationSequence, tokens: int) -> None:
        self._runner.copy(source, sequence.row, tokens)
        sequence.computed = sequence.cached = tokens
