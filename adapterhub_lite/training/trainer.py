"""The trainer: a `Trainer` in every respect, whose loss never builds the logits and whose result is an adapter.

Knows how a step is made and what is kept of a run. Rows, tokens, batches, records and files are other modules' work.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer

from adapterhub_lite.bases import ResolvedBase, load_tokenizer
from adapterhub_lite.errors import ConfigurationError, NonFiniteLossError
from adapterhub_lite.losses import causal_lm_loss, head_of
from adapterhub_lite.record import DataRecord, MemoryRecord, TrainingRecord
from adapterhub_lite.training.adapters import open_base, save_peft, with_adapter, write_adapter
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.collation import PaddedCollator
from adapterhub_lite.training.hidden_states import HiddenStates
from adapterhub_lite.training.measurement import PeakMemory, describe_hardware
from adapterhub_lite.training.progress import MetricsCallback, ProgressCallback, RunMeter
from adapterhub_lite.training.recording import describe_base, hyperparameters, packages, write_record
from adapterhub_lite.training.tokenization import prepare_rows, rows_fingerprint, template_digest


class AdapterTrainer(Trainer):
    """Trains a LoRA on a frozen base and saves it as a plain PEFT folder with the record of its making.

    `model` is a base's name, its folder, a model in memory, or a `PeftModel`; `train_dataset` and `eval_dataset` are
    tokenised data sets, or anything that `load_rows` takes; `base` says where a model in memory came from, for the
    record. Every other keyword is the `Trainer`'s own.

    Raises:
        DataError: a row is not what was wanted.
        ConfigurationError: model, tokenizer and arguments do not fit together.
        NonFiniteLossError: while training, the loss became NaN or infinite.
    """

    args: AdapterTrainingArguments
    model: Any
    train_dataset: Any
    processing_class: Any

    def __init__(
        self,
        model: Any,
        args: AdapterTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        *,
        base: ResolvedBase | None = None,
        **trainer_keywords: Any,
    ) -> None:
        self.meter = RunMeter(PeakMemory(args.device))
        model, self.base = open_base(model, base)
        tokenizer = processing_class or (load_tokenizer(self.base.folder) if self.base else None)
        if tokenizer is None:
            raise ConfigurationError("The trainer wants a tokenizer. Give it as processing_class.")
        self.data_name = train_dataset if isinstance(train_dataset, str | Path) else "rows in memory"
        prepare = partial(prepare_rows, tokenizer=tokenizer, max_length=args.max_length, overlong=args.overlong)
        train_dataset = prepare(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(rows) for name, rows in eval_dataset.items()}
        else:
            eval_dataset = prepare(eval_dataset)
        adapted = with_adapter(model, args, peft_config, self.base)
        trainer_keywords.setdefault("data_collator", PaddedCollator(tokenizer.pad_token_id))
        super().__init__(
            adapted,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **trainer_keywords,
        )
        # Our loss is divided by the tokens of the whole accumulated batch already.
        self.loss_is_scaled_for_ga = True
        self.hidden_states = HiddenStates(self.model)
        self.pop_callback(PrinterCallback)
        self.add_callback(MetricsCallback(self.meter))
        if args.show_progress:
            self.add_callback(ProgressCallback(self.meter))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum the loss of the valid tokens and divide once, by those of the whole accumulated, gathered batch.

        `inputs` holds `labels` (batch, seq) with -100 where nothing is learned. The logits are never built; asked for
        outputs, the model's own are returned, whose logits are those of the last position alone.
        """
        labels = inputs["labels"]
        hidden, outputs = self.hidden_states.of(model, {k: v for k, v in inputs.items() if k != "labels"})
        total = causal_lm_loss(
            head_of(self.model), hidden, labels, reduction="sum", chunk_tokens=self.args.loss_chunk_tokens
        )
        if num_items_in_batch is None:
            num_items_in_batch = (labels[..., 1:] != -100).sum()
        loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices:
            # Data-parallel engines average gradients over processes; the division above is by all their tokens.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self._watch(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def _watch(self, loss: Tensor, inputs: Mapping[str, Tensor]) -> None:
        mask = inputs.get("attention_mask")
        self.meter.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}; the last checkpoint in "
                f"{self.args.output_dir} is from before. Lower the learning rate (now {self.args.learning_rate})."
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate one batch: the loss alone, without logits, unless predictions are asked for."""
        if not prediction_loss_only or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_peft(self.accelerator.unwrap_model(self.model), folder, state_dict)

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter to `folder`: PEFT's two files and the training record; it appears whole or not at all.

        Raises:
            ConfigurationError: `folder` is there already and is not empty.
            ResourceError: it cannot be written.
        """
        model = self.accelerator.unwrap_model(self.model)
        return write_adapter(model, Path(folder), also=lambda aside: write_record(self.record(), aside))

    def record(self) -> TrainingRecord:
        """Return the record of the run so far."""
        model = self.accelerator.unwrap_model(self.model)
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        table = self.train_dataset
        return TrainingRecord(
            base=describe_base(self.base, model),
            data=DataRecord(id=Path(self.data_name).name, rows=len(table), fingerprint=rows_fingerprint(table)),
            template_digest=template_digest(self.processing_class),
            seeds={"seed": self.args.seed, "data_seed": self.args.data_seed or self.args.seed},
            hyperparameters=hyperparameters(self.args, model.active_peft_config.to_dict()),
            packages=packages(),
            preset="none",
            loss_backend={"name": "tiled"},
            memory=MemoryRecord(measured_peak_bytes=self.meter.memory.peak_bytes()),
            hardware=describe_hardware(self.args.device),
            steps=self.state.global_step,
            final_loss=losses[-1] if losses else None,
            wall_seconds=self.meter.seconds,
        )
