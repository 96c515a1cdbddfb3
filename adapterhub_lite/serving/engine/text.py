"""From token ids to text as it grows: whole characters only, and never past a stop string."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Decodes one answer piece by piece. `text` is all that was given out, `stopped` whether a stop string came."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
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
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _give(self, piece: str) -> str:
        """Pass on what cannot be the beginning of a stop string."""
        pending = self._held + piece
        found = [at for at in (pending.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            given, self._held = pending[: min(found)], ""
        else:
            keep = max((_overlap(pending, stop) for stop in self._stop), default=0)
            given, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of the whole of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
