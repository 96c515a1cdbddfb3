"""From rows to token ids and labels, with the loss on what the assistant writes and nowhere else. Knows no model.

A row becomes one text or several (`chats`); texts are encoded a batch at a time, each once and as a whole, and a label is
learned where its token stands for a character that is learned.
"""

import hashlib
import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases.encoding import (
    EncodedText,
    encode_after,
    encode_texts,
    end_tokens,
    missing_front,
    tokens_around,
)
from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.chats import ChatLayout, Example, Span
from adapterhub_lite.training.data.reading.shapes import short
from adapterhub_lite.training.data.reading.tables import (
    Dataset,
    Features,
    List,
    TableWriter,
    Value,
    column_batches,
    says,
)
from adapterhub_lite.training.data.rows import SOURCE_COLUMN

logger = logging.getLogger(__name__)
IGNORED = -100
Overlong = Literal["refuse", "truncate", "truncate_start", "drop"]
Unlearnable = Literal["refuse", "drop"]
ROWS_AT_A_TIME = 500
WEIGHTS_COLUMN = "token_weights"
COLUMNS = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")}
WEIGHTS = {WEIGHTS_COLUMN: List(Value("float32"))}


@dataclass(frozen=True)
class Limits:
    """How long a row may be in tokens (None: as long as it is), and what becomes of a longer one.

    `truncate` cuts its end, `truncate_start` its beginning (but for the tokens that every text begins with). A row of
    which nothing is left to learn is refused or dropped, as `unlearnable` says.
    """

    max_length: int | None
    overlong: Overlong = "refuse"
    unlearnable: Unlearnable = "refuse"

    @property
    def most(self) -> int:
        """The longest row in tokens, as a number in any case."""
        return sys.maxsize if self.max_length is None else self.max_length


@dataclass(frozen=True)
class Learning:
    """What is learned of a row beyond the default, which is the assistant's turns, or the completion.

    `whole_chats` and `prompts` add what stands around them; `answers_only` refuses plain text, which has no answer.
    """

    whole_chats: bool = False
    prompts: bool = False
    answers_only: bool = False

    def is_whole(self, row: Mapping[str, Any]) -> bool:
        """Whether every token of a row that has an answer is learned."""
        return self.prompts if "completion" in row else self.whole_chats


@dataclass(frozen=True)
class TokenizedRows:
    """A table with `input_ids`, `labels` and `length` a row, and what was done to rows beyond the limit.

    `ways` counts the examples by how they were laid out: "marks", "whole", "per turn"; plain text counts as "text".
    `prefill` is what the template writes when it asks and that none of the answers begins with.
    """

    table: Any  # a Dataset; a stream goes through as it came
    truncated: int = 0
    dropped: int = 0
    ways: Mapping[str, int] = field(default_factory=dict)
    prefill: str = ""

    @property
    def fingerprint(self) -> str:
        """The sha256 over every token id and label, in order."""
        return rows_fingerprint(self.table)


@dataclass(frozen=True)
class Tokens:
    """One example as it is trained: `labels` are -100 where nothing is learned, `weights` count in the loss.

    The first `front` tokens stand in front of whatever is encoded, such as BOS.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float]
    front: int = 0

    def fitted(self, most: int, overlong: Overlong) -> "Tokens":
        """The first `most` tokens, or with "truncate_start" the last; a BOS stays in front."""
        if overlong == "truncate":
            return Tokens(self.ids[:most], self.labels[:most], self.weights[:most])
        front = self.front if self.front < most else 0
        last = slice(len(self.ids) - most + front, None)
        return Tokens(
            self.ids[:front] + self.ids[last],
            self.labels[:front] + self.labels[last],
            self.weights[:front] + self.weights[last],
            front,
        )

    @property
    def teaches(self) -> bool:
        """Whether any label is left to learn; the first token of a row is predicted by nothing."""
        return any(label != IGNORED for label in self.labels[1:])


class Fitted:
    """Fits examples into the limits, and counts what it did.

    Of rows that were tokenised elsewhere, only what a cut leaves is looked at: the proof of a run looks at the rest.
    """

    def __init__(self, limits: Limits, *, tokenized: bool = False) -> None:
        self.limits, self.tokenized = limits, tokenized
        self.truncated = self.dropped = 0

    def fit(self, examples: Iterable[tuple[str, Tokens]]) -> Iterator[Tokens]:
        """Yield the examples that stay, cut where they had to be.

        Raises:
            DataError: one is too long, or nothing of it is left to learn, and that is to be refused.
        """
        most = self.limits.most
        for where, tokens in examples:
            kept, too_long = tokens, len(tokens.ids) > most
            if too_long and self.limits.overlong == "refuse":
                raise DataError(
                    f"{where}: expected at most {most} tokens, found {len(tokens.ids)}. Raise max_length, shorten the "
                    "row, or say overlong='truncate', 'truncate_start' or 'drop'."
                )
            if too_long and self.limits.overlong == "drop":
                self.dropped += 1
                continue
            if too_long:
                kept = tokens.fitted(most, self.limits.overlong)
            if kept.teaches or (self.tokenized and not too_long):
                self.truncated += too_long
                yield kept
            elif self.limits.unlearnable == "drop":
                self.dropped += 1
            else:
                raise DataError(
                    f"{where}: no token is left to learn from: the assistant's turn is empty or lies beyond "
                    f"max_length={most}. Raise max_length, remove the row, or say unlearnable='drop'."
                )


def rows_fingerprint(table: Dataset) -> str:
    """Return the sha256 over `input_ids` and `labels` of every row of `table`, in order; without labels, the ids are learned.

    A table whose tokens are made as it is read has none: "not countable".
    """
    if "input_ids" not in table.column_names:
        return "not countable"
    digest = hashlib.sha256()
    for row in table.select_columns([name for name in ("input_ids", "labels") if name in table.column_names]):
        ids = [int(one) for one in row["input_ids"]]
        digest.update(repr((ids, [int(one) for one in row.get("labels", ids)])).encode())
    return digest.hexdigest()


class RowTokenizer:
    """Makes examples of rows for one tokenizer. `ends` are the ids that end an answer; None takes the tokenizer's EOS."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ends: Iterable[int] | None = None,
        arguments: Mapping[str, Any] | None = None,
        ignore: frozenset[str] = frozenset(),
        learning: Learning | None = None,
        bounded_template: str | None = None,
    ) -> None:
        self.tokenizer, self.learning = tokenizer, learning or Learning()
        self.ends = frozenset(end_tokens(tokenizer) if ends is None else ends)
        self.front = tokens_around(tokenizer)[0]
        self.markers = frozenset(tokenizer.all_special_ids)
        names = [str(tokenizer.convert_ids_to_tokens(end) or "") for end in self.ends]
        self.layout = ChatLayout(
            tokenizer,
            [name for name in names if name],
            arguments=arguments,
            ignore=ignore,
            bounded_template=bounded_template,
        )
        self.ways: dict[str, int] = {}
        self.prefills: dict[str, str] = {}
        # Some families call their end token the unknown one too, which says nothing.
        unknown, known = (
            tokenizer.unk_token_id,
            (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id),
        )
        self.unknown = None if unknown in known else unknown
        self.first_unknown = ""
        self.chats = self.without_prefill = 0

    def prefill(self) -> str:
        """What asking begins an answer with and no answer of these rows does; "" where some do, or it differs."""
        return next(iter(self.prefills)) if len(self.prefills) == 1 and self.chats == self.without_prefill else ""

    def tell(self) -> None:
        """Say once what of the rows a person should know: keys that are not read, and answers that begin otherwise."""
        if self.layout.unread:
            named = "; ".join(f"{key!r} (first in {where})" for key, where in sorted(self.layout.unread.items()))
            logger.warning(f"The chat template does not read these keys of turns: {named}.")
        if self.first_unknown:
            logger.warning(
                f"The tokenizer has no token for some of the text of these rows, which it reads as {self.tokenizer.unk_token!r} "
                f"(first {self.first_unknown})."
            )
        if self.prefill():
            logger.warning(
                f"Asked for an answer, the chat template begins it with {self.prefill()!r}, and no answer of these rows "
                "begins so: the adapter will be asked without it. To train with it, give rows with reasoning_content."
            )
            return
        for prefill, where in self.prefills.items():
            logger.warning(
                f"Asked for an answer, the chat template begins it with {prefill!r}, and some answers of these rows do not "
                f"begin so (first in {where}). Ask with the template's arguments that leave it out, or give all rows "
                "reasoning_content."
            )

    def examples(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Tokens]]:
        """Yield (where, tokens) of each example of `rows`, (where, row) pairs in one of the three shapes.

        Raises:
            DataError: a row cannot be laid out, or teaches nothing.
        """
        laid_out = [(where, example) for where, row in rows for example in self.texts(where, row)]
        cuts = [[at for span in example.spans for at in (span.start, span.end)] for _, example in laid_out]
        prompts = [example.text[: example.spans[0].start] for _, example in laid_out if example.way == "completion"]
        try:
            encoded = encode_texts(self.tokenizer, [example.text for _, example in laid_out], cuts)
            asked = iter(encode_texts(self.tokenizer, prompts))
        except ValueError as error:
            raise DataError(f"{rows[0][0]}: {error}.") from error
        for (where, example), found in zip(laid_out, encoded, strict=True):
            self.ways[example.way] = self.ways.get(example.way, 0) + 1
            if example.way not in ("text", "completion"):
                self.chats += 1
            if example.prefill:
                self.prefills.setdefault(example.prefill, where)
                self.without_prefill += 1
            if not self.first_unknown and self.unknown is not None and self.unknown in found.ids:
                at = found.ids.index(self.unknown)
                self.first_unknown = f"{short(example.text[found.starts[at] : found.ends[at]])} in {where}"
            if example.way == "text":
                yield where, self._document([], missing_front(self.front, found.ids) + found.ids)
            elif example.way == "completion":
                yield where, self.completion_tokens(example, found.ids, next(asked).ids)
            else:
                yield where, self.chat_tokens(example, found)

    def texts(self, where: str, row: Mapping[str, Any]) -> list[Example]:
        """The texts that are learned of a row."""
        if isinstance(row.get("text"), str):
            if self.learning.answers_only:
                raise DataError(
                    f"{where}: plain text has no answer to learn alone. Give prompt and completion, or messages, or leave "
                    "out completion_only_loss and assistant_only_loss."
                )
            return [Example(row["text"], (Span(0, len(row["text"])),), "text")]
        if isinstance(row.get("completion"), str):
            whole = row["prompt"] + row["completion"]
            if self.learning.prompts:
                return [Example(whole, (Span(0, len(whole)),), "text")]
            return [Example(whole, (Span(len(row["prompt"]), len(whole)),), "completion")]
        examples = self.layout.examples(row, where, entire=self.learning.is_whole(row))
        if not examples:
            raise DataError(f"{where}: no turn is to be learned: each has the weight 0. Remove the row.")
        return examples

    def chat_tokens(self, example: Example, found: EncodedText) -> Tokens:
        """A token is learned that stands for a learned character; a marker only if none of it lies before them."""
        labels, weights = [IGNORED] * len(found.ids), [1.0] * len(found.ids)
        for span in example.spans:
            for index in range(bisect_right(found.ends, span.start), len(found.ids)):
                if found.starts[index] >= span.end:
                    break
                if found.starts[index] >= span.start or found.ids[index] not in self.markers:
                    labels[index], weights[index] = found.ids[index], span.weight
        return Tokens(found.ids, labels, weights, self._front_of(found.ids))

    def completion_tokens(self, example: Example, whole: list[int], prompt: list[int]) -> Tokens:
        """The prompt is encoded as it is when it is asked; a token across the border is one that is never seen then."""
        asked = missing_front(self.front, prompt) + prompt
        whole = missing_front(self.front, whole) + whole
        if whole[: len(asked)] == asked:
            return self._document(asked, whole[len(asked) :])
        return self._document(asked, encode_after(self.tokenizer, example.text[example.spans[0].start :]))

    def _document(self, prompt: list[int], learned: list[int]) -> Tokens:
        """With one end token: none is added where the text ends in one already, but for white space after it."""
        end = self.tokenizer.eos_token_id
        written = next((token for token in reversed(learned) if str(self.tokenizer.decode([token])).strip()), None)
        if end is not None and written not in self.ends:
            learned = [*learned, end]
        ids = prompt + learned
        return Tokens(ids, [IGNORED] * len(prompt) + learned, [1.0] * len(ids), self._front_of(ids))

    def _front_of(self, ids: list[int]) -> int:
        return len(self.front) if ids[: len(self.front)] == self.front else 0


def tokenize_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overlong: Overlong = "refuse",
    unlearnable: Unlearnable = "refuse",
    ends: Iterable[int] | None = None,
    arguments: Mapping[str, Any] | None = None,
    ignore: frozenset[str] = frozenset(),
    learning: Learning | None = None,
    bounded_template: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenizedRows:
    """Tokenise every row of a table that `load_rows` made; labels are -100 except on the tokens to be learned.

    Learned are the assistant's turns of `messages` with the token that ends each, the `completion` with the end token,
    or all of `text`. A chat that its template lays out differently once more turns follow becomes several examples.
    `ends` are the ids that end an answer (the tokenizer's EOS without it), `arguments` go to the template with every
    row, `ignore` names keys that may be lost, `learning` says what else is learned, `bounded_template` is a template of a
    stranger in place of the tokenizer's; `progress` is told how many rows are done. The table has a column `token_weights`
    where a turn counts neither 0 nor 1.

    Raises:
        DataError: a row is too long (and `overlong` is "refuse"), or nothing of it is left to learn; the tokenizer
            has no chat template, or one that the row does not come out of whole.
    """
    maker = RowTokenizer(
        tokenizer, ends=ends, arguments=arguments, ignore=ignore, learning=learning, bounded_template=bounded_template
    )
    fitted = Fitted(Limits(max_length, overlong, unlearnable))
    # A column that is rarely there: only files that speak of weights can need it.
    columns = {**COLUMNS, **(WEIGHTS if speaks_of_weights(rows) else {})}
    writer, done, weighted = TableWriter(Features(columns)), 0, False
    for batch in column_batches(rows, ROWS_AT_A_TIME):
        named = named_rows(batch)
        found = list(fitted.fit(maker.examples(named)))
        weighted = weighted or any(weight != 1.0 for tokens in found for weight in tokens.weights)
        values = token_columns(found)
        writer.write({name: values[name] for name in columns})
        done += len(named)
        if progress is not None:
            progress(done)
    table = writer.finish()
    if not len(table):
        raise DataError(
            f"All {fitted.dropped} rows are longer than max_length={max_length} and were dropped. Raise max_length."
        )
    maker.tell()
    unneeded = [name for name in WEIGHTS if name in columns and not weighted]
    return TokenizedRows(
        table.remove_columns(unneeded), fitted.truncated, fitted.dropped, dict(maker.ways), maker.prefill()
    )


def token_columns(found: Sequence[Tokens]) -> dict[str, list[Any]]:
    """The columns of a tokenised table, of examples."""
    return {
        "input_ids": [tokens.ids for tokens in found],
        "labels": [tokens.labels for tokens in found],
        "length": [len(tokens.ids) for tokens in found],
        WEIGHTS_COLUMN: [tokens.weights for tokens in found],
    }


def named_rows(batch: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of each row of a batch of columns."""
    columns = dict(batch)
    places = columns.pop(SOURCE_COLUMN)
    return [
        (place, {name: values[index] for name, values in columns.items() if values[index] is not None})
        for index, place in enumerate(places)
    ]


def speaks_of_weights(rows: Dataset) -> bool:
    """Whether any row says how much a turn counts."""
    return any(says(rows, name, '"weight"') for name in ("messages", "completion") if name in rows.column_names)


def row_lengths(table: Any) -> list[int]:
    """Tokens of each row of a tokenised table; empty for one that cannot be counted, such as a streamed one."""
    names = getattr(table, "column_names", None) or ()
    if not isinstance(table, Dataset) or "input_ids" not in names:
        return []
    return list(table["length"]) if "length" in names else [len(ids) for ids in table["input_ids"]]
