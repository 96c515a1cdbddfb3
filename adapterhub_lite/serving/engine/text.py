"""The text of an answer, piece by piece: what is certain so far, and where a stop string ends it.

An adapter with tokens of its own is asked and read with a copy of the base's tokenizer that has them too.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.adapter_format.added_tokens import AddedTokens, tokenizer_with
from adapterhub_lite.errors import ConfigurationError

# Copies of the base's tokenizer, some megabytes each, that are kept.
MOST_TOKENIZERS = 16


class Tokenizers:
    """The base's tokenizer, and one for each set of tokens that adapters add to it. Not thread-safe."""

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        self._base = base
        self._made: OrderedDict[AddedTokens, PreTrainedTokenizerBase] = OrderedDict()

    def of(self, added: AddedTokens | None) -> PreTrainedTokenizerBase:
        """The tokenizer for an adapter with these tokens.

        Raises:
            ConfigurationError: the base's does not take them.
        """
        if added is None:
            return self._base
        if added not in self._made:
            try:
                self._made[added] = tokenizer_with(added, self._base)
            except ValueError as error:
                raise ConfigurationError(f"The adapter's own tokens do not fit this base: {error}.") from error
        self._made.move_to_end(added)
        while len(self._made) > MOST_TOKENIZERS:
            self._made.popitem(last=False)
        return self._made[added]


class TextStream:
    """Decodes one answer piece by piece. `text` is all that was given out, `stopped` whether a stop string came.

    Stop strings count from the piece that the token number `min_tokens` ends. Special tokens have no text; `left_out` None
    are all of them, else only these.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        left_out: Collection[int] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._left_out = left_out
        self._stop = [StopString(text) for text in stop]
        self._min_tokens = min_tokens
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that is now certain, possibly none."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        if now.endswith("�"):  # a character of several tokens is not whole yet
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._give(now[len(before) :])

    def finish(self) -> str:
        """Return what was held back: the end of the answer has come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        rest = self._decode(self._ids[self._prefix :])[len(before) :]
        self._prefix = self._read = len(self._ids)
        piece = self._give(rest)
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        every = self._left_out is None
        ids = ids if self._left_out is None else [token for token in ids if token not in self._left_out]
        return str(self._tokenizer.decode(ids, skip_special_tokens=every, clean_up_tokenization_spaces=False))

    def _give(self, piece: str) -> str:
        """Pass on what cannot be the beginning of a stop string."""
        pending = self._held + piece
        if len(self._ids) < self._min_tokens:
            self.text += pending
            return pending
        for at, character in enumerate(piece, len(self._held)):
            complete = [len(stop.text) for stop in self._stop if stop.advance(character)]
            if complete:
                self.stopped = True
                given, self._held = pending[: at + 1 - max(complete)], ""
                break
        else:
            keep = max((stop.matched for stop in self._stop), default=0)
            given, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += given
        return given


class StopString:
    """Follows one stop string through a text. `matched` is the length of the longest end of the text that begins it.

    Knuth, Morris and Pratt's matcher: a character costs constant time on average, however long the stop string is, and
    its table grows only as far as the text matches.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # _shorter[n - 1]: the length of the longest end of text[:n], short of the whole, that begins the text.
        self._shorter = [0]

    def advance(self, character: str) -> bool:
        """Take the next character; True when the stop string ends with it."""
        self.matched = self._after(self.matched, character)
        if self.matched > len(self._shorter):
            self._shorter.append(self._after(self._shorter[-1], self.text[len(self._shorter)]))
        return self.matched == len(self.text)

    def _after(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)
