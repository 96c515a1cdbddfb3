"""What watches over a run: the output folder, the proofs, the pre-flight, and a signal to stop.

A callback that asks the trainer for the pieces it needs; the checks themselves lie in `proof` and `preflight`.
"""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.estimate import PROVEN_TOKENS
from adapterhub_lite.runs.folder import METRICS_FILE
from adapterhub_lite.runs.state import KEPT_FILES
from adapterhub_lite.training.data.collation import PackedCollator, PaddedCollator
from adapterhub_lite.training.data.reading.tables import Dataset
from adapterhub_lite.training.data.tokenization import IGNORED
from adapterhub_lite.training.data.vocabulary import write_words
from adapterhub_lite.training.model.assembly import plain
from adapterhub_lite.training.model.master_weights import AT_ONCE
from adapterhub_lite.training.run import checkpoints
from adapterhub_lite.training.run.checks import (
    GradientProof,
    check_batch,
    check_loss,
    check_rows,
    fly,
    longest_rows,
    nothing_happened,
    read_while_training,
)
from adapterhub_lite.training.run.interrupts import StopRequest
from adapterhub_lite.training.run.progress import PLOT_FILE
from adapterhub_lite.training.run.record import make_record, write_record
from adapterhub_lite.training.run.run_trainer import RunTrainer

PROVEN_STEPS = 2
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEFTOVERS = (METRICS_FILE, PLOT_FILE, checkpoints.STAGING, *KEPT_FILES)


class RunGuard(TrainerCallback):
    """Stops a run that cannot be right before it costs time, and one that is told to end after it is saved."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.stop = StopRequest()
        self.steps_seen = 0
        self.gradients: GradientProof | None = None
        trainer.describe_checkpoint = self.describe
        folder = Path(str(trainer.args.output_dir))
        # Looked at before any integration writes there. What a run leaves that was killed before its first checkpoint
        # is no reason to refuse: nothing in it was promised to anybody.
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        self.was_there = [name for name in found if name not in LEFTOVERS]

    @property
    def stop_asked(self) -> bool:
        """Whether the run was asked to stop before its end."""
        return self.stop.asked

    def listening(self) -> AbstractContextManager[None]:
        """While inside, SIGTERM or Ctrl-C asks the run to save and stop after what it is in; see `StopRequest`."""
        return self.stop.listening(Path(str(self.trainer.args.output_dir)))

    def describe(self, folder: Path) -> None:
        """Make a checkpoint say what it is, so that it can be added as an adapter: its record and its chat template."""
        trainer = self.trainer
        if trainer.base is not None and isinstance(trainer.bare_model(), PeftModel):
            write_record(make_record(trainer), folder)
            write_words(trainer.processing_class, trainer.base, trainer.opened.added, folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check folder and data, prove the loss, and fly the longest batch, before the first step."""
        folder = Path(str(args.output_dir))
        if state.global_step == 0 and self.was_there:
            shown = ", ".join(self.was_there[:3])
            raise ConfigurationError(
                f"The output folder {folder} is not empty ({shown}). Give a new folder, or go on with the run in it "
                "by resume_from_checkpoint=True."
            )
        self.was_there = []
        if args.should_save:
            checkpoints.sweep(folder)
            forget_after(folder / METRICS_FILE, state.global_step)
        self.steps_seen = 0
        trainer = self.trainer
        if trainer.args.proof:
            ends = trainer.preparation.ends
            if trainer.collates_itself():
                elsewhere = not trainer.rows.ways
                vocabulary = _vocabulary(trainer.model)
                check_rows(
                    trainer.train_dataset,
                    trainer.processing_class,
                    vocabulary,
                    ends,
                    tokenized_elsewhere=elsewhere,
                    truncated=trainer.rows.truncated,
                )
            trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
            self.gradients = GradientProof(trainable)
            if trainer.is_deepspeed_enabled:
                self.gradients.listen(trainer.model)
            prove_loss(trainer)
        # What steps inside backward could not be put back.
        optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        fly = trainer.args.preflight and not trainer.is_deepspeed_enabled and type(optimizer).__name__ not in AT_ONCE
        loader = kwargs.get("train_dataloader")
        rows: Any = getattr(loader, "dataset", None)
        if fly and state.global_step == 0 and _has_rows(rows) and len(rows):
            self._fly(loader, optimizer)

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Check a batch of a stream before it is learned; tables were checked before the run."""
        trainer = self.trainer
        checked = isinstance(trainer.train_dataset, Dataset) and trainer.collates_itself()
        if trainer.args.proof and not checked and batch.get("labels") is not None:
            must_teach = self.steps_seen < PROVEN_STEPS
            check_batch(batch, _vocabulary(trainer.model), trainer.state.global_step + 1, must_teach)

    # A loader is whatever the user's own `get_train_dataloader` makes.
    def _fly(self, loader: Any, optimizer: torch.optim.Optimizer) -> None:
        trainer = self.trainer
        rows = longest_rows(loader.dataset, trainer._train_batch_size, counted=trainer.train_dataset)

        def step(some: list[dict[str, Any]]) -> None:
            with nothing_happened(trainer.model, optimizer):
                # As the loop does it: its collator, its columns, its count of what is learned.
                batch = loader.collate_fn(some)
                items = trainer._get_num_items_in_batch([batch], trainer.args.device)
                trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
                trainer.training_step(trainer.model_wrapped, batch, items)
                optimizer.step()

        tokens = trainer.meter.tokens
        if trainer.args.auto_find_batch_size:
            step(rows)
        else:
            fly(step, rows, trainer.args.gradient_accumulation_steps, str(trainer.args.device))
        trainer.meter.tokens = tokens

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prove the gradients of the first two steps."""
        if self.gradients and self.steps_seen < PROVEN_STEPS:
            named = self.gradients.of(self.trainer.model)
            if self.trainer.accelerator.scaler is not None and _overflowed(named):
                # fp16's loss scale finds its size by overflowing; such a step is skipped, and proves nothing.
                return
            self.steps_seen += 1
            if self.steps_seen == 1 and any(gradient is None for _, gradient in named):
                # As PEFT would: our own ways read the weights of layers, and call none of them.
                with plain(self.trainer.assembly) as model:
                    self.gradients.leave_out(read_while_training(model))
            self.gradients.check(named, last=self.steps_seen == PROVEN_STEPS)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a step is finished before the run stops."""
        self.stop.doing = "this step"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asked to stop: save first."""
        self._stop_if_asked(control, save=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on an evaluation is finished before the run stops."""
        self.stop.doing = "this evaluation"

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asked to stop while evaluating: save the step it came after."""
        self._stop_if_asked(control, save=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asked to stop while saving: that was it."""
        self._stop_if_asked(control, save=False)

    def _stop_if_asked(self, control: TrainerControl, *, save: bool) -> None:
        if self._any_process_was_asked():
            self.stop.asked = control.should_training_stop = True
            control.should_save = control.should_save or save

    def _any_process_was_asked(self) -> bool:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return self.stop.asked
        # A signal reaches one process first; all have to stop after the same step.
        asked = accelerator.reduce(torch.tensor(int(self.stop.asked), device=self.trainer.args.device))
        return bool(asked > 0)


def _overflowed(named: Iterable[tuple[str, Tensor | None]]) -> bool:
    return any(gradient is not None and not bool(torch.isfinite(gradient).all()) for _, gradient in named)


def prove_loss(trainer: RunTrainer) -> None:
    """Compare the loss of a slice of the first row with the cross entropy of the model's own logits.

    Raises:
        ProofFailedError: they differ.
    """
    if not _has_rows(trainer.train_dataset):
        return
    assert isinstance(trainer.train_dataset, Dataset)
    row = trainer.train_dataset[0]
    labels = row.get("labels", row["input_ids"])
    first = next((i for i, label in enumerate(labels) if i and label != IGNORED), 1)
    start = max(0, min(first - 8, len(labels) - PROVEN_TOKENS))
    cut = {"input_ids": row["input_ids"][start:][:PROVEN_TOKENS], "labels": labels[start:][:PROVEN_TOKENS]}
    device = trainer.args.device
    batch = {name: value.to(device) for name, value in PaddedCollator(0)([cut]).items()}
    # A collator of the user's own is for rows as they are, not for a piece of one.
    own = PackedCollator() if trainer.assembly.packing.packs else PaddedCollator(0)
    packed = {name: value.to(device) for name, value in own([cut]).items()}
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    precision = MIXED.get(trainer.accelerator.mixed_precision)
    with torch.no_grad():
        check_loss(trainer.model, batch, lambda: trainer.step_loss.sum(model, packed, smoothing=0.0)[0], precision)
    model.train(was_training)


def describe_failure(trainer: RunTrainer, loss: Tensor, inputs: dict[str, Any]) -> str:
    """The sentence for a loss that is not finite: the step, the batch, and what to do."""
    begins = trainer.processing_class.decode(inputs["input_ids"][0, :24])
    return (
        f"The loss became {loss.item()} at step {trainer.state.global_step + 1}, in the batch that begins {begins!r}. "
        f"Checkpoints in {trainer.args.output_dir} are from before and were kept. Lower the learning rate (now "
        f"{trainer._get_learning_rate():.2g}), or look at the rows of that batch."
    )


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of `metrics.jsonl` that lie beyond `step`: the resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # A kill in the middle of a write leaves half a line: not worth keeping.
        return float("inf")


def _has_rows(table: Any) -> bool:
    return (
        hasattr(table, "column_names") and hasattr(table, "__getitem__") and "input_ids" in (table.column_names or ())
    )


def _vocabulary(model: Any) -> int:
    weight: Tensor = model.get_input_embeddings().weight
    return int(getattr(model.config.get_text_config(), "vocab_size", weight.shape[0]))
