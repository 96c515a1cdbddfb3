"""From rows to token ids and labels, with the loss on the assistant's tokens alone. Knows no model.

A chat template with `{% generation %}` markers says itself which tokens are the assistant's. Without markers the
template is rendered up to each turn, and what an assistant turn adds after its header is what is learned: exactly the
tokens that the model will have to produce after the prompt that inference gives it.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.training.data.rows import SOURCE_COLUMN, load_rows
from adapterhub_lite.training.distributed.launch import launched

logger = logging.getLogger(__name__)
IGNORED = -100
Overlong = Literal["refuse", "truncate", "drop"]
Turns = list[dict[str, str]]


@dataclass(frozen=True)
class TokenizedRows:
    """A table with `input_ids`, `labels` and `length` a row, and what was done to rows beyond the limit."""

    table: Any
    truncated: int = 0
    dropped: int = 0

    @property
    def fingerprint(self) -> str:
        """The sha256 over every token id and label, in order."""
        return rows_fingerprint(self.table)


def rows_fingerprint(table: Dataset) -> str:
    """Return the sha256 over `input_ids` and `labels` of every row of `table`, in order."""
    digest = hashlib.sha256()
    for row in table.select_columns(["input_ids", "labels"]):
        digest.update(repr((list(row["input_ids"]), list(row["labels"]))).encode())
    return digest.hexdigest()


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of the chat template that `tokenizer` carries, or of nothing where it has none."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()


def tokenize_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, overlong: Overlong = "refuse"
) -> TokenizedRows:
    """Tokenise every row; labels are -100 except on the tokens to be learned.

    Learned are the assistant's turns of `messages` with the token that ends each, the `completion` with the end token,
    or all of `text`. A row beyond `max_length` tokens is refused, truncated on the right, or dropped, as asked.

    Raises:
        DataError: a row is too long (and `overlong` is "refuse"), or nothing of it is left to learn; the tokenizer
            has no chat template, or one that cannot show which tokens are the assistant's.
    """
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    truncated = dropped = 0
    for row in rows:
        where = row.get(SOURCE_COLUMN, "a row")
        ids, labels = _tokenize_row(row, tokenizer, where)
        if len(ids) > max_length:
            if overlong == "refuse":
                raise DataError(
                    f"{where}: wanted at most {max_length} tokens, found {len(ids)}. Raise max_length, shorten the "
                    "row, or say overlong='truncate' or 'drop'."
                )
            truncated, dropped = truncated + (overlong == "truncate"), dropped + (overlong == "drop")
            if overlong == "drop":
                continue
            ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(
                f"{where}: no token is left to learn from: the assistant's turn is empty or lies beyond "
                f"max_length={max_length}. Raise max_length, or remove the row."
            )
        for key, value in (("input_ids", ids), ("labels", labels), ("length", len(ids))):
            columns[key].append(value)
    if not columns["length"]:
        raise DataError(
            f"All {dropped} rows are longer than max_length={max_length} and were dropped. Raise max_length."
        )
    return TokenizedRows(Dataset.from_dict(columns), truncated, dropped)


def _tokenize_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    if "text" in row:
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        return ids, list(ids)
    if "prompt" in row and isinstance(row["prompt"], str):
        # Apart, because inference tokenises the prompt alone: a merge across the border would never be seen there.
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [
            *tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        return prompt + completion, [IGNORED] * len(prompt) + completion
    turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    learn_from = 0 if "messages" in row else len(row["prompt"])
    return _tokenize_chat(turns, learn_from, tokenizer, where)


def _tokenize_chat(
    turns: Turns, learn_from: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    template = tokenizer.chat_template
    if not template:
        raise DataError(
            f"{where}: the tokenizer has no chat template, so chats cannot be laid out. "
            "Set tokenizer.chat_template, or give rows with prompt and completion."
        )
    if learn_from == 0 and isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        marked: Any = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids = list(marked["input_ids"])
        masks = marked["assistant_masks"]
        return ids, [token if mask else IGNORED for token, mask in zip(ids, masks, strict=True)]
    ids, labels = [], []
    for text, learned in _pieces(turns, learn_from, tokenizer, where):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += _until_end(piece, tokenizer.eos_token_id) if learned else [IGNORED] * len(piece)
    return ids, labels


def _pieces(
    turns: Turns, learn_from: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[tuple[str, bool]]:
    """Cut the rendered chat into (text, learned) pieces at the borders of each learned assistant turn."""
    whole = _render(turns, tokenizer)
    done = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index < learn_from:
            continue
        header = _render(turns[:index], tokenizer, add_generation_prompt=True)
        through = _render(turns[: index + 1], tokenizer)
        if not (whole.startswith(header) and whole.startswith(through) and len(through) > len(header) >= done):
            raise DataError(
                f"{where}: the chat template lays out turn {index + 1} differently once more turns follow, and has no "
                "{% generation %} markers, so the assistant's tokens cannot be told apart. "
                "Give the tokenizer a training template with markers (trl.get_training_chat_template has those of many "
                "families), or rows with prompt and completion."
            )
        yield whole[done : len(header)], False
        yield whole[len(header) : len(through)], True
        done = len(through)
    if done < len(whole):
        yield whole[done:], False


def _render(turns: Turns, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    return str(text)


def _until_end(piece: Sequence[int], end: int | None) -> list[int]:
    """Labels of an assistant's piece up to its last end token; what a template puts after that is not learned."""
    last = max((i for i, token in enumerate(piece) if token == end), default=len(piece) - 1)
    return [token if i <= last else IGNORED for i, token in enumerate(piece)]


def row_lengths(table: Any) -> list[int]:
    """Tokens of each row of a tokenised table; empty for one that cannot be counted, such as a streamed one."""
    names = getattr(table, "column_names", None) or ()
    if not isinstance(table, Dataset) or "input_ids" not in names:
        return []
    return list(table["length"]) if "length" in names else [len(ids) for ids in table["input_ids"]]


def prepare_rows(
    rows: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int, overlong: Overlong
) -> TokenizedRows:
    """Tokenise what are still rows, and warn of how many were cut or left out; tables that have `input_ids` stay.

    Streams and None stay as they are, too.

    Raises:
        DataError: a row is not what was wanted.
    """
    if isinstance(rows, Dataset):
        if "input_ids" in rows.column_names:
            return TokenizedRows(_with_positions(rows))
        table = rows if SOURCE_COLUMN in rows.column_names else load_rows(rows)
    elif isinstance(rows, str | Path | list):
        table = load_rows(rows)
    else:
        return TokenizedRows(rows)
    found = tokenize_rows(table, tokenizer, max_length=max_length, overlong=overlong)
    for count, done in ((found.truncated, "truncated"), (found.dropped, "dropped")):
        if count:
            logger.warning(f"{count} of {len(table)} rows are longer than max_length={max_length} and were {done}.")
    return found


def _with_positions(table: Dataset) -> Dataset:
    """What TRL's `pack_dataset` wrote as `seq_lengths`, in the words that models know: positions that begin again."""
    if "seq_lengths" not in table.column_names or "position_ids" in table.column_names:
        return table

    def positions(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"position_ids": [place for length in row["seq_lengths"] for place in range(length)]}

    return table.map(positions, remove_columns=["seq_lengths"], keep_in_memory=True)


def prepare_sets(rows: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int, overlong: Overlong) -> Any:
    """`prepare_rows` of one evaluation set, or of each in a dict by name: the tables alone.

    Raises:
        ConfigurationError: a packed table, and several processes.
        DataError: a row is not what was wanted.
    """
    if isinstance(rows, dict):
        prepare = partial(prepare_sets, tokenizer=tokenizer, max_length=max_length, overlong=overlong)
        return {name: prepare(one) for name, one in rows.items()}
    table = prepare_rows(rows, tokenizer, max_length=max_length, overlong=overlong).table
    if launched() and "position_ids" in (getattr(table, "column_names", None) or ()):
        raise ConfigurationError(
            "Processes that share an evaluation tell repeated rows by their number, and a packed row holds several "
            "sequences. Give the evaluation rows unpacked."
        )
    return table
