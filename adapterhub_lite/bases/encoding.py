"""From a text to token ids, once for training and serving: which special tokens stand around it, and where each token lies.

A tokenizer's post-processor may put tokens around whatever it encodes (BOS, `[CLS]`, EOS). What a model reads has them
once: in front of a document, never in its middle, and the end token only where an answer or a document ends.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.bases.broken import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that no tokenizer is known to merge with what follows them, tried in this order by `encode_after`.
SEPARATORS = ("\n", "|", "=", ";")


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text, without tokens around it; token i stands for the characters `starts[i]` to `ends[i]`."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], cuts: Sequence[Sequence[int]] | None = None
) -> list[EncodedText]:
    """Encode each text as it stands: special tokens that are written in it are themselves, none are added.

    A tokenizer without offsets (one in Python) is asked for the text up to each of `cuts` (character positions, one
    list per text), so that positions are exact at the cuts and nowhere else.

    Raises:
        ValueError: such a tokenizer encodes a text up to a cut otherwise than the whole of it.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [encode_in_parts(tokenizer, text, cuts[i] if cuts is not None else ()) for i, text in enumerate(texts)]
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        EncodedText(ids, *without_gaps(offsets))
        for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def without_gaps(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends without gaps: the white space that a byte-level tokenizer trims off belongs to its token."""
    ends = list(accumulate((end for _, end in offsets), max))
    return [min(start, reached) for (start, _), reached in zip(offsets, [0, *ends], strict=False)], ends


def encode_in_parts(tokenizer: Any, text: str, cuts: Sequence[int]) -> EncodedText:
    """Encode a text with positions that are exact at the cuts alone."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    starts, ends, before = [], [], 0
    for start, end in pairwise(sorted({0, *cuts, len(text)})):
        part: list[int] = tokenizer.encode(text[:end], add_special_tokens=False) if end < len(text) else ids
        if ids[: len(part)] != part:
            raise ValueError(
                "this tokenizer has no offsets and encodes a text otherwise when more follows; take its fast version"
            )
        starts += [start] * (len(part) - before)
        ends += [end] * (len(part) - before)
        before = len(part)
    return EncodedText(ids, starts, ends)


def tokens_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text it encodes with special tokens."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a text that a model goes on from: BOS (or what the tokenizer puts in front) once, no end token.

    A text that begins with these tokens already, such as a rendered chat, gets no second ones.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return missing_front(tokens_around(tokenizer)[0], ids) + ids


def missing_front(front: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Which of the tokens `front` are still missing before `ids`."""
    for count in range(len(front), 0, -1):
        if list(ids[:count]) == list(front[-count:]):
            return list(front[:-count])
    return list(front)


def encode_after(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a text that follows another one: without the space that SentencePiece puts before what it takes for a beginning."""
    for separator in SEPARATORS:
        (found,) = encode_texts(tokenizer, [separator + text], [[len(separator)]])
        cut = next((i for i, start in enumerate(found.starts) if start >= len(separator)), len(found.ids))
        if cut and found.ends[cut - 1] == len(separator):
            return found.ids[cut:]
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def end_tokens(tokenizer: "PreTrainedTokenizerBase", *configs: Any) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's EOS, and those of the model's `configs` (generation and model).

    A folder among `configs` stands for the two files in it.
    """
    found: set[int] = set()
    for source in (tokenizer, *configs):
        values = ends_in(source) if isinstance(source, Path) else [getattr(source, "eos_token_id", None)]
        for value in values:
            found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)


def ends_in(folder: Path) -> list[Any]:
    """What the two configurations in a folder say of end tokens; raises as `read_object` does."""
    files = [folder / name for name in ("generation_config.json", "config.json")]
    return [read_object(path).get("eos_token_id") for path in files if path.is_file()]


# How byte-level tokenizers write bytes: printable ones as they are, the others from 256 on, as GPT-2 has it.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_LETTERS = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: "PreTrainedTokenizerBase", token_id: int) -> bytes | None:
    """The bytes that a token stands for, also where it is a piece of a character; None where that cannot be told."""
    text = str(tokenizer.decode([token_id]))
    if "\ufffd" not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token_id))
    if single := BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(single[1])
    if all(letter in BYTE_LETTERS for letter in piece):
        return bytes(BYTE_LETTERS[letter] for letter in piece)
    return text.encode() if "\ufffd" in piece else None


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """A token id to fill batches with; which one is no matter, because padding is masked by length."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(one) for one in found if one is not None)
