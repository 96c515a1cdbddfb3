"""The `Trainer` of rows: what it is given is made ready once, and what a set is read by depends on what is asked of it.

Knows arguments, rows and collators; nothing of a step.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainingArguments

from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.collation import PADDED_COLUMNS, PackedCollator, PaddedCollator
from adapterhub_lite.training.data.preparation import Preparation
from adapterhub_lite.training.data.rows import Formatting
from adapterhub_lite.training.data.tokenization import WEIGHTS_COLUMN, Learning
from adapterhub_lite.training.data.vocabulary import check_vocabulary, with_tokens
from adapterhub_lite.training.model.adapters import OpenedBase
from adapterhub_lite.training.model.new_rows import check_can_bring, grow
from adapterhub_lite.training.porting import translated
from adapterhub_lite.training.run.run_trainer import RunTrainer
from adapterhub_lite.training.settings import MAX_TEMPLATE_BYTES, DataSettings

TRAINER_KEYWORDS = frozenset(inspect.signature(Trainer.__init__).parameters) - {"self", "model", "args", "model_init"}


class RowsTrainer(RunTrainer):
    """A `RunTrainer` whose sets may be rows of any shape, and whose batches are packed where nobody looks at them."""

    padded: PaddedCollator
    rows_read_by: str | None = None

    def packed_or_padded(self) -> PackedCollator | PaddedCollator:
        """The collator of batches that only the loss is taken of."""
        return PackedCollator() if self.assembly.packing.packs else self.padded

    def _ready(self, rows: Any) -> Any:
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if rows is None or (isinstance(rows, str) and rows in sets):
            return rows
        if isinstance(rows, str) and sets and "/" not in rows and not Path(rows).exists():
            raise DataError(
                f"There is no evaluation set {rows!r}, and no such file. The sets are {', '.join(map(repr, sets))}."
            )
        return self.preparation.sets(rows)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The loader of an evaluation; `eval_dataset` is the name of a set given before, or any rows."""
        predicts = self.compute_metrics is not None and not self.args.prediction_loss_only
        with self._collating_by(self.padded if predicts else None):
            return super().get_eval_dataloader(self._ready(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The loader of a prediction; rows without labels have none."""
        with self._collating_by(replace(self.padded, learn_ids=False)):
            return super().get_test_dataloader(self._ready(test_dataset))

    @contextmanager
    def _collating_by(self, collator: PaddedCollator | None) -> Iterator[None]:
        """Make a loader with this collator instead of the run's own; one of the user's stays."""
        before = self.data_collator
        if collator is not None and self.collates_itself():
            self.data_collator = collator
        try:
            yield
        finally:
            self.data_collator = before

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: list[str] = self._signature_columns or []
        if WEIGHTS_COLUMN not in names:
            # The collator reads them, though the model's forward does not. transformers types the list as None.
            self._signature_columns = [*names, WEIGHTS_COLUMN]  # type: ignore[assignment]


def sorted_out(
    args: TrainingArguments | None, rows: Any, keywords: dict[str, Any]
) -> tuple[AdapterTrainingArguments, dict[str, Any], Any]:
    """The arguments of a run, the `Trainer`'s keywords, and a tokenizer given under its older name.

    Raises:
        ConfigurationError: a keyword means nothing here; says what does it.
    """
    if inspect.isroutine(rows) or (
        callable(rows) and not hasattr(rows, "__getitem__") and not hasattr(rows, "__iter__")
    ):
        raise ConfigurationError(
            "The third argument of AdapterTrainer is the training rows. Give a collator by its name: data_collator=..."
        )
    made = AdapterTrainingArguments.of(args)
    lost = [name for name in made.label_names or () if name not in PADDED_COLUMNS]
    if lost and keywords.get("data_collator") is None:
        raise ConfigurationError(
            f"label_names has {', '.join(map(repr, lost))}, and the batches made here hold {', '.join(PADDED_COLUMNS)}. "
            "Give a data_collator that keeps what else a metric is to see."
        )
    tokenizer = keywords.pop("tokenizer", None)
    own = {name: value for name, value in keywords.items() if name in TRAINER_KEYWORDS}
    foreign = {name: value for name, value in keywords.items() if name not in own}
    if foreign:
        # Older trainers took settings beside the arguments.
        meant = translated(foreign, [one.name for one in fields(made) if one.init])
        made = made.changed(**meant)
        made.set_by_hand |= frozenset(meant)
    return made, own, tokenizer


def preparation_for(
    opened: OpenedBase,
    args: AdapterTrainingArguments,
    settings: DataSettings,
    formatting_func: Formatting | None,
    *,
    own_batches: bool,
) -> Preparation:
    """How rows become tokens in a run with these arguments; without `own_batches` a collator was given."""
    column = args.dataset_text_field
    if formatting_func is None and column not in (None, "text"):

        def formatting_func(row: Any) -> Any:
            return {"text": row[column]} if column in row else row

    answers_only = bool(args.completion_only_loss or args.assistant_only_loss)
    made = Preparation.for_run(
        opened.tokenizer,
        settings,
        # What is cut into rows may be of any length.
        max_length=None if args.packing in ("wrapped", "bfd_split") else args.max_length,
        overlong=args.overlong,
        ends=opened.ends(),
        formatting_func=formatting_func,
        learning=Learning(args.assistant_only_loss is False, args.completion_only_loss is False, answers_only),
    )
    if own_batches:
        return made
    # As in the `Trainer`: who keeps every column, and collates them, may tokenise them there.
    return replace(made, collated="elsewhere" if args.remove_unused_columns else "raw")


def with_words(opened: OpenedBase, args: AdapterTrainingArguments, *, checked: bool) -> OpenedBase:
    """Give the run's tokenizer the chat template and the tokens that the arguments name.

    `checked` says that it is the base's own. What it then has beyond that is what the adapter brings along.

    Raises:
        ConfigurationError: a token is not in the vocabulary, or there already; there is no such template; or the tokenizer
            cannot be used on that base.
    """
    before, added = opened.tokenizer, None
    tokenizer = with_tokens(before, args.added_tokens) if args.added_tokens else before
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is not None and token not in tokenizer.get_vocab():
            raise ConfigurationError(
                f"{name}={token!r} is not in the tokenizer's vocabulary. Give one that is, or name it in added_tokens too."
            )
        if token is not None:
            setattr(tokenizer, name, token)
    if args.chat_template_path is not None:
        tokenizer.chat_template = template_at(args.chat_template_path)
    if not checked or opened.model is not None or args.added_tokens:
        added = check_vocabulary(tokenizer, opened.base, opened.model, before)
        check_can_bring(added, args)
    if opened.model is not None:
        grow(opened.model, added, args.seed)
    return replace(opened, tokenizer=tokenizer, added=added)


def template_at(path: str) -> str:
    """The chat template in a Jinja file, or that of the tokenizer in a folder or on the Hub.

    Raises:
        ConfigurationError: there is none.
    """
    if Path(path).is_file():
        template = DataSettings(chat_template=path).chat_template_text()
    else:
        try:
            template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"There is no chat template at {path}: give a Jinja file, or a tokenizer's folder."
            ) from error
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES:
        raise ConfigurationError(f"There is no single chat template at {path}. Give a Jinja file.")
    return template
