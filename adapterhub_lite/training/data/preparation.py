"""What the trainer is given, made ready for it: rows are tokenised, tables of tokens cut to the limits, streams as they come."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.packing import pack
from adapterhub_lite.training.data.reading.files import without_none
from adapterhub_lite.training.data.reading.shapes import Columns, normalized
from adapterhub_lite.training.data.reading.tables import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    TableWriter,
    are_progress_bars_disabled,
    table_of,
)
from adapterhub_lite.training.data.rows import Formatting, columns_of, is_checked, load_rows
from adapterhub_lite.training.data.tokenization import (
    COLUMNS,
    IGNORED,
    WEIGHTS,
    WEIGHTS_COLUMN,
    Fitted,
    Learning,
    Limits,
    Overlong,
    RowTokenizer,
    TokenizedRows,
    Tokens,
    token_columns,
    tokenize_rows,
)
from adapterhub_lite.training.distributed.launch import is_first, launched
from adapterhub_lite.training.settings import DataSettings

logger = logging.getLogger(__name__)
MASKS = frozenset({"assistant_masks", "completion_mask"})
PER_TOKEN = ("labels", "attention_mask", WEIGHTS_COLUMN, *MASKS)
READ_COLUMNS = frozenset({"input_ids", "position_ids", "seq_lengths", "length", *PER_TOKEN})


Collated = Literal["here", "elsewhere", "raw"]
# Fewer rows are tokenised before a bar could be read.
MANY_ROWS = 5_000


@contextmanager
def progress_of(rows: int) -> Iterator[Callable[[int], None] | None]:
    """Show on standard error how many of many rows are tokenised, unless `datasets` was told to show no bars."""
    if rows < MANY_ROWS or are_progress_bars_disabled() or not is_first():
        yield None
        return
    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=rows)
        yield lambda done: bar.update(task, completed=done)


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens in one run. `arguments` go to the chat template with every row.

    `bounded_template` is a chat template of a stranger, such as an adapter's, in place of the tokenizer's. `collated` says who
    makes the batches: "elsewhere" is a collator of the user's, and "raw" one that is given rows as they are.
    """

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    ends: frozenset[int] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    columns: Columns = field(default_factory=Columns)
    formatting_func: Formatting | None = None
    learning: Learning = field(default_factory=Learning)
    bounded_template: str | None = None
    collated: Collated = "here"

    @classmethod
    def for_run(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        settings: DataSettings,
        *,
        max_length: int | None,
        overlong: Overlong = "refuse",
        ends: frozenset[int] | None = None,
        formatting_func: Formatting | None = None,
        learning: Learning | None = None,
    ) -> "Preparation":
        """What the settings of a command say; a chat template that they name becomes the tokenizer's."""
        template = settings.chat_template_text()
        if template is not None:
            tokenizer.chat_template = template
        limits = Limits(max_length, overlong, settings.unlearnable)
        arguments = settings.template_arguments()
        columns = columns_of(settings)
        return cls(tokenizer, limits, ends, arguments, columns, formatting_func, learning or Learning())

    @property
    def masks(self) -> frozenset[str]:
        """The masks of tokenised rows that are heeded: where prompts are learned, a completion's is not."""
        return MASKS - {"completion_mask"} if self.learning.prompts else MASKS

    def maker(self) -> RowTokenizer:
        """What makes examples of rows here."""
        return RowTokenizer(
            self.tokenizer,
            ends=self.ends,
            arguments=self.arguments,
            ignore=self.columns.ignore,
            learning=self.learning,
            bounded_template=self.bounded_template,
        )

    def rows(self, rows: Any) -> TokenizedRows:
        """Tokenise what are still rows, and warn of how many were cut or left out; None stays None.

        A table that has `input_ids` is cut to the limits, and its masks become labels. A stream is made ready row by
        row as it is read.

        Raises:
            DataError: a row cannot be used.
        """
        if isinstance(rows, DatasetDict | IterableDatasetDict):
            rows = train_split(rows)
        if isinstance(rows, Iterator):
            rows = list(rows)
        if self.collated == "raw" and isinstance(rows, Dataset | IterableDataset | list | tuple):
            first = next(iter(rows), None)
            if not (isinstance(first, Mapping) and "input_ids" in first):
                return TokenizedRows(rows)
        if self.collated == "here" and rows is not None and not holds_rows(rows):
            rows = rows_of_a_class(rows)
        if rows is None or not holds_rows(rows):
            return TokenizedRows(rows)
        if isinstance(rows, list | tuple) and rows and isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
            rows = table_of_tokens(rows)
        if isinstance(rows, IterableDataset):
            return TokenizedRows(self.tokenized_stream(rows))
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            return self._told(self.tokenized_table(rows), len(rows))
        if isinstance(rows, Dataset) and is_checked(rows):
            table = rows
        else:
            table = load_rows(rows, columns=self.columns, formatting_func=self.formatting_func)
        with progress_of(len(table)) as progress:
            found = tokenize_rows(
                table,
                self.tokenizer,
                max_length=self.limits.max_length,
                overlong=self.limits.overlong,
                unlearnable=self.limits.unlearnable,
                ends=self.ends,
                arguments=self.arguments,
                ignore=self.columns.ignore,
                learning=self.learning,
                bounded_template=self.bounded_template,
                progress=progress,
            )
        return self._told(found, len(table))

    def training_rows(self, rows: Any, args: AdapterTrainingArguments, *, own_batches: bool = True) -> TokenizedRows:
        """The rows to train on: tokenised, then shuffled and packed as the arguments say.

        Raises:
            ConfigurationError: packing, and batches that are made by somebody else (`own_batches` False).
            DataError: a row cannot be used.
        """
        found = self.rows(rows)
        table = found.table
        if args.shuffle_dataset and isinstance(table, Dataset | IterableDataset):
            table = table.shuffle(seed=args.seed)
        if args.packing != "none" and table is not None:
            if not own_batches:
                raise ConfigurationError("packing lays out the batches too: leave out data_collator, or packing.")
            assert args.max_length is not None, "the arguments see to it"
            table = pack(table, args.packing, args.max_length)
        return replace(found, table=table)

    def sets(self, rows: Any) -> Any:
        """`rows` of one evaluation set, or of each in a dict by name: the tables alone.

        Raises:
            ConfigurationError: a packed table, and several processes.
            DataError: a row cannot be used.
        """
        if isinstance(rows, dict):  # a DatasetDict too: one evaluation for each table
            return {name: self.sets(one) for name, one in rows.items()}
        table = self.rows(rows).table
        if launched() and "position_ids" in (getattr(table, "column_names", None) or ()):
            raise ConfigurationError(
                "Processes that share an evaluation tell repeated rows by their number, and a packed row holds several "
                "sequences. Give the evaluation rows unpacked."
            )
        return table

    def _told(self, found: TokenizedRows, rows: int) -> TokenizedRows:
        for count, done in ((found.truncated, "truncated"), (found.dropped, "dropped")):
            if count:
                most = self.limits.max_length
                logger.warning(f"{count} of {rows} rows are longer than max_length={most} and were {done}.")
        return found

    def tokenized_table(self, table: Dataset) -> TokenizedRows:
        """A table that has tokens already: its masks become labels, and its rows are cut to the limits."""
        unread = sorted(set(table.column_names) - READ_COLUMNS)
        if unread:
            logger.warning(f"Of the tokenised rows these columns are not used: {', '.join(unread)}.")
        names = set(table.column_names)
        packed = bool(names & {"seq_lengths", "position_ids"})
        fits = max(longest_of(table), default=0) <= self.limits.most
        if fits and not names & MASKS and (not packed or "position_ids" in names):
            return TokenizedRows(table)
        if packed:
            return TokenizedRows(self.packed_table(table))
        fitted, weighted = Fitted(self.limits, tokenized=True), WEIGHTS_COLUMN in names
        writer = TableWriter(Features({**COLUMNS, **(WEIGHTS if weighted else {})}))
        before = 0
        for batch in table.iter(batch_size=1000):
            rows = [{name: values[i] for name, values in batch.items()} for i in range(len(batch["input_ids"]))]
            named = [(f"row {before + i}", row) for i, row in enumerate(rows)]
            found = list(fitted.fit((where, tokens_of(row, where, self.masks)) for where, row in named))
            values = token_columns(found)
            writer.write({name: values[name] for name in writer.names})
            before += len(rows)
        return TokenizedRows(writer.finish(), fitted.truncated, fitted.dropped)

    def packed_table(self, table: Dataset) -> Dataset:
        """What TRL's `pack_dataset` wrote as `seq_lengths`, in the words that models know: positions that begin again."""
        most = self.limits.most

        def with_positions(row: dict[str, Any]) -> dict[str, Any]:
            lengths = row.get("seq_lengths")
            positions = row.get("position_ids") or [place for length in lengths or () for place in range(length)]
            longest = max(positions, default=0) + 1
            if longest > most:
                raise DataError(
                    f"A packed row holds a sequence of {longest} tokens, expected at most {most}. Raise max_length, or "
                    "cut the rows before they are packed."
                )
            labels = tokens_of(row, masks=self.masks).labels
            return {"position_ids": positions, "labels": labels}

        drop = [name for name in ("seq_lengths", *MASKS) if name in table.column_names]
        return table.map(with_positions, remove_columns=drop)

    def tokenized_stream(self, stream: IterableDataset) -> IterableDataset:
        """A stream of rows or of tokens, made ready as it is read."""
        first = next(iter(stream), None)
        if first is None:
            raise DataError("The stream holds no rows. Give at least one.")
        tokenized, told = "input_ids" in first, set[str]()
        fitted = Fitted(self.limits, tokenized=tokenized)
        maker = self.maker()

        def ready(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            rows = [
                (f"row {number} of the stream", {name: values[i] for name, values in batch.items()})
                for i, number in enumerate(numbers)
            ]
            if tokenized:
                examples: Iterable[tuple[str, Tokens]] = (
                    (where, tokens_of(row, where, self.masks)) for where, row in rows
                )
            else:
                examples = maker.examples([(where, self.checked_row(where, row, told)) for where, row in rows])
            found = list(fitted.fit(examples))
            made: dict[str, list[Any]] = {
                "input_ids": [one.ids for one in found],
                "labels": [one.labels for one in found],
            }
            # A key that the first row did not have cannot be taken away, only emptied.
            return {**{name: [None] * len(found) for name in set(batch) - set(first)}, **made}

        return stream.map(ready, with_indices=True, batched=True, batch_size=32, remove_columns=list(first))

    def checked_row(self, where: str, row: Mapping[str, Any], told: set[str]) -> dict[str, Any]:
        """A row of a stream in one of the three shapes; keys that are not used are named once."""
        made, unused = normalized(where, without_none(dict(row)), self.columns)
        if unused - told:
            logger.warning(f"Of the stream these columns are not used: {', '.join(sorted(unused - told))} ({where}).")
            told |= unused
        return made


def rows_of_a_class(data: Any) -> Any:
    """A data set of the user's own class as it is, where it gives tokens; its rows where they are not tokens yet.

    Raises:
        DataError: it is no data set, or does not give rows.
    """
    kind = type(data).__name__
    if isinstance(data, Mapping | bytes) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        raise DataError(f"The rows are given as a {kind}, expected a list of rows, a table, or a file of them.")
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data)):
        return data
    first = data[0]
    if not isinstance(first, Mapping):
        raise DataError(
            f"The rows are given as a {kind} of {type(first).__name__}, expected a mapping for each row. Give a "
            "data_collator that makes batches of them, or rows."
        )
    return data if "input_ids" in first else [data[index] for index in range(len(data))]


def table_of_tokens(rows: Sequence[Any]) -> Dataset:
    """The table of rows that were tokenised elsewhere and lie in a list, as the `Trainer` takes them too.

    Raises:
        DataError: one of them is no such row, or a column holds values of several kinds.
    """
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or "input_ids" not in row:
            found = ", ".join(map(repr, row)) if isinstance(row, Mapping) else type(row).__name__
            raise DataError(f"row {index}: expected 'input_ids' as in the rows before, found {found or 'nothing'}.")
    try:
        return table_of(rows)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DataError(f"The tokenised rows are no table: {error}. Give each column one kind of value.") from error


def tokens_of(row: Mapping[str, Any], where: str = "a row", masks: frozenset[str] = MASKS) -> Tokens:
    """The tokens of a row that was tokenised elsewhere: without padding, and without labels that its `masks` leave out.

    Raises:
        DataError: a column of it has another length than `input_ids`.
    """
    ids = list(row["input_ids"])
    columns = {name: list(row[name]) for name in PER_TOKEN if row.get(name) is not None}
    wrong = next((name for name, values in columns.items() if len(values) != len(ids)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: {wrong!r} has {len(columns[wrong])} values, expected one for each of {len(ids)} tokens."
        )
    labels = columns.get("labels", ids)
    for name in masks & set(columns):
        labels = [label if kept else IGNORED for label, kept in zip(labels, columns[name], strict=True)]
    weights = columns.get(WEIGHTS_COLUMN, [1.0] * len(ids))
    kept = [index for index, real in enumerate(columns.get("attention_mask", [1] * len(ids))) if real]
    return Tokens([ids[i] for i in kept], [labels[i] for i in kept], [weights[i] for i in kept])


def longest_of(table: Dataset) -> Iterator[int]:
    """Tokens of each sequence of a tokenised table."""
    if "position_ids" in table.column_names:
        return (max(places, default=-1) + 1 for places in table["position_ids"])
    if "seq_lengths" in table.column_names:
        return (max(lengths, default=0) for lengths in table["seq_lengths"])
    return (len(ids) for ids in table["input_ids"])


def train_split(tables: Mapping[Any, Any]) -> Any:
    """The table to train on of several.

    Raises:
        DataError: none is called train.
    """
    if "train" not in tables:
        raise DataError(
            f"These are several tables ({', '.join(map(str, tables))}), and none is called train. Give one of them."
        )
    return tables["train"]


def holds_rows(data: Any) -> bool:
    """Whether these are rows; a data set of the user's own class, or one that makes tokens as it is read, is left alone."""
    if isinstance(data, Dataset) and data.format["type"] == "custom" and len(data):
        return "input_ids" not in data[0]
    return isinstance(data, str | Path | list | tuple | Dataset | IterableDataset) or hasattr(data, "to_dict")
