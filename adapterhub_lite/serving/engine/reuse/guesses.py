"""Guessed tokens: while few requests write, what probably comes next is computed with the next token and then checked.

A step of four tokens takes hardly longer than one of a single token, since the base's weights are read once for both. So a
request that writes is given guesses: what its form allows alone, then what `Habits` of the same adapter and tenant say. The
token is chosen from the logits as always; a guess only decides whether the next logits are there already. So answers are
the same with and without, greedy or sampled, and a request whose guesses fail has fewer of them.

Answers of one task are alike up to what they take from their prompts: `SELECT * FROM orders WHERE weight < 90` after "Which
orders have weight less than 90?". So an answer is read as symbols: a token; or that it was copied from its text, after which
token it stood there; or that the copy went on. What followed the same symbols before is counted, and is guessed for the
next answer with its own prompt put in. Prompt lookup (arXiv:2304.04487) is the case of no answer before.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapterhub_lite.serving.engine.reuse.prefixes import Key, key_of
from adapterhub_lite.serving.engine.sequence import GenerationSequence
from adapterhub_lite.serving.model.packed_step import RowSlice

# Tokens of a step, guessed ones included: up to here they share each read of the weights.
MOST_TOKENS = 8
# After guesses that were all wrong, so many tokens are written without, twice as many each time.
PAUSE, LONGEST_PAUSE = 1, 64
# Contexts that are kept of earlier answers, of one adapter and tenant and of all: some 300 bytes each.
KEPT_OF_ONE, KEPT_OF_ALL = 1 << 14, 1 << 16
# How many symbols are looked up, the most first.
LENGTHS = (4, 3, 2, 1)
# A guess goes on while it is right as a whole with this probability: one token more costs about a tenth of a step.
LEAST = 0.1
# What comes unseen, in times seen.
UNSEEN = 0.5
# Symbols: a token is itself. `COPIED` is a token that goes on where one was copied before, `_after(t)` one that stood after t.
COPIED = -1


def _after(token: int) -> int:
    return -2 - token


@dataclass(frozen=True)
class _State:
    """Of a text that is written: the last symbols, where its last token was copied from, and how many were in a row."""

    symbols: tuple[int, ...]
    last: int
    place: int | None = None
    run: int = 0


class Writing:
    """One request's text, prompt and answer, as it is written."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        self._places: dict[int, int] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        for token in prompt:
            self._append(token)
        self._state = _State(tuple(prompt[-max(LENGTHS) :]), prompt[-1])
        self.met: list[tuple[tuple[int, ...], int]] = []

    def write(self, token: int) -> None:
        """Take in the next token of the answer."""
        before = self._state
        symbol, self._state = self._advance(before, token)
        self.met.append((before.symbols, symbol))
        self._append(token)

    def guess(self, habits: "Habits | None", known: Sequence[int], most: int) -> list[int]:
        """What probably comes next, at most `most` tokens; it begins with `known`, which is certain."""
        state, guess, probability = self._state, list(known), 1.0
        for token in known:
            state = self._advance(state, token)[1]
        while len(guess) < most:
            found = self._likeliest(state, habits)
            if found is None or probability * found[1] < LEAST:
                break
            token, probability = found[0], probability * found[1]
            guess.append(token)
            state = self._advance(state, token)[1]
        return guess

    def _likeliest(self, state: _State, habits: "Habits | None") -> tuple[int, float] | None:
        """The next token and how probable it is."""
        for symbol, probability in () if habits is None else habits.after(state.symbols):
            token = symbol if symbol >= 0 else self._copied(state, symbol)
            if token is not None:
                return token, probability
        token = self._copied(state, COPIED)
        return None if token is None else (token, state.run / (state.run + 1))

    def _copied(self, state: _State, symbol: int) -> int | None:
        before = state.place if symbol == COPIED else self._places.get(_after(symbol))
        return self._text[before + 1] if before is not None and before + 1 < len(self._text) else None

    def _advance(self, state: _State, token: int) -> tuple[int, _State]:
        """The symbol that `token` is, and the state after it."""
        place, symbol, run = self._places.get(token), token, 0
        if state.place is not None and state.place + 1 < len(self._text) and self._text[state.place + 1] == token:
            place, symbol, run = state.place + 1, COPIED, state.run + 1
        elif place:  # the first stands after nothing
            place = self._pairs.get((state.last, token), place)
            symbol, run = _after(self._text[place - 1]), 1
        kept = (*state.symbols, max(symbol, COPIED))
        return symbol, _State(kept[-max(LENGTHS) :], token, place, run)

    def _append(self, token: int) -> None:
        self._places[token] = len(self._text)
        if self._text:
            self._pairs[self._text[-1], token] = len(self._text)
        self._text.append(token)


class Habits:
    """What followed which symbols in the answers so far."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._next)

    def add(self, writing: Writing) -> None:
        """Count what an answer was made of."""
        for symbols, symbol in writing.met:
            for length in LENGTHS:
                counts = self._next.setdefault(symbols[-length:], {})
                counts[symbol] = counts.get(symbol, 0) + 1

    def after(self, symbols: tuple[int, ...]) -> list[tuple[int, float]]:
        """What came next and how often, of as many of the last symbols as were met before, the most frequent first."""
        for length in LENGTHS:
            counts = self._next.get(symbols[-length:])
            if counts is not None:
                whole = sum(counts.values()) + UNSEEN
                return [
                    (symbol, count / whole) for symbol, count in sorted(counts.items(), key=lambda one: -one[1])[:3]
                ]
        return []


class _Own:
    """What is known of one request's guesses."""

    def __init__(self, sequence: GenerationSequence) -> None:
        self.writing = Writing(sequence.prompt_ids)
        self.written = 0
        self.pause, self.until = PAUSE, 0

    def follow(self, output: Sequence[int]) -> None:
        """Take in what has been written since."""
        for token in output[self.written :]:
            self.writing.write(token)
        self.written = len(output)


class Guesses:
    """Guesses for the requests of one engine. Only its thread uses it."""

    def __init__(self) -> None:
        self._own: dict[int, _Own] = {}
        self._earlier: OrderedDict[Key, Habits] = OrderedDict()
        self.made = 0
        self.right = 0

    def add(self, slices: list[RowSlice], running: Sequence[GenerationSequence]) -> list[RowSlice]:
        """Return what the rows compute, with guesses where all of them write and few they are."""
        by_row = {sequence.row: sequence for sequence in running}
        each = MOST_TOKENS // len(slices) - 1 if slices else 0
        if each < 1 or any(len(part.token_ids) > 1 or not by_row[part.row].output for part in slices):
            return slices
        return [self._with_guess(part, by_row[part.row], each) for part in slices]

    def _with_guess(self, part: RowSlice, sequence: GenerationSequence, most: int) -> RowSlice:
        # What is put into modules is computed apart, where more tokens cost more.
        apart = any(one.weights.extras for one in sequence.route.parts)
        if apart or sequence.labels is not None or sequence.computed + 1 != sequence.known:
            return part
        own = self._own.get(id(sequence))
        if own is None:
            own = self._own[id(sequence)] = _Own(sequence)
        own.follow(sequence.output)
        # The last token of an answer is chosen from the logits of the one before.
        most = min(most, sequence.limit - own.written - 1)
        if most < 1:
            return part
        guess = [] if sequence.constraint is None else sequence.constraint.forced()[:most]
        if own.written >= own.until:
            guess = own.writing.guess(self._earlier.get(key_of(sequence)), guess, most)
        if not guess:
            return part
        return replace(part, token_ids=[*part.token_ids, *guess], logits=1 + len(guess))

    def learn(self, sequence: GenerationSequence, made: int, right: int) -> None:
        """`right` of `made` guesses for a sequence were."""
        self.made += made
        self.right += right
        own = self._own.get(id(sequence))
        if own is None:
            return
        if right:
            own.pause = PAUSE
        else:
            own.until, own.pause = own.written + own.pause, min(2 * own.pause, LONGEST_PAUSE)

    def ended(self, sequence: GenerationSequence, *, keep: bool) -> None:
        """A sequence has left its row; `keep` its answer for those who come, if it was guessed at: among many rows none is."""
        own = self._own.pop(id(sequence), None)
        if not keep or own is None:
            return
        own.follow(sequence.output)
        key = key_of(sequence)
        habits = self._earlier.pop(key, None)
        if habits is None or len(habits) > KEPT_OF_ONE:
            habits = Habits()
        habits.add(own.writing)
        self._earlier[key] = habits
        while len(self._earlier) > 1 and sum(map(len, self._earlier.values())) > KEPT_OF_ALL:
            self._earlier.popitem(last=False)
