"""The trainer: a `Trainer` in every respect, whose loss never builds the logits and whose result is an adapter.

Knows how a step is made and what is kept of a run. Rows, tokens, batches, proofs, records and files are other modules'
work.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from adapterhub_lite.adapter_format.manifest import TrainingRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import NonFiniteLossError, OutOfMemoryError
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.collation import PackedCollator, PaddedCollator, unpack
from adapterhub_lite.training.data.preparation import Preparation
from adapterhub_lite.training.data.rows import Formatting
from adapterhub_lite.training.data.tokenization import WEIGHTS_COLUMN, row_lengths
from adapterhub_lite.training.data.vocabulary import check_vocabulary
from adapterhub_lite.training.distributed import sharded
from adapterhub_lite.training.evaluation import GeneratedMetrics
from adapterhub_lite.training.model.adapters import loraplus_optimizer, open_base
from adapterhub_lite.training.model.assembly import assemble
from adapterhub_lite.training.run.guard import RunGuard, describe_failure
from adapterhub_lite.training.run.measurement import MemoryReport, PeakMemory, RunMeter
from adapterhub_lite.training.run.memory_choice import choose_memory, is_out_of_memory, with_less
from adapterhub_lite.training.run.progress import PLOT_FILE, MetricsCallback, ProgressCallback, draw_losses
from adapterhub_lite.training.run.record import make_record, save_adapter
from adapterhub_lite.training.run.run_trainer import RunTrainer
from adapterhub_lite.training.run.step_loss import EvaluationSums, StepLoss, without_repeats
from adapterhub_lite.training.settings import DataSettings

logger = logging.getLogger(__name__)


class AdapterTrainer(RunTrainer):
    """Trains a LoRA on a frozen base and saves it as a plain PEFT folder with the record of its making.

    `model` is a base's name, its folder, a model in memory, or a `PeftModel`; `train_dataset` and `eval_dataset` are
    tokenised data sets, or anything that `load_rows` takes; `base` says where a model in memory came from, for the
    record; `generated_metrics` are asked in each evaluation. `data_settings` and
    `formatting_func` say how rows are read and laid out. Every other keyword is the `Trainer`'s own.

    Raises:
        DataError: a row is not what was wanted.
        ConfigurationError: model, tokenizer and arguments do not fit together.
        TrainingError: while training, the run was found to be wrong; see its subclasses.
    """

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
        generated_metrics: GeneratedMetrics | None = None,
        data_settings: DataSettings | None = None,
        formatting_func: Formatting | None = None,
        **trainer_keywords: Any,
    ) -> None:
        before = PeakMemory.before(args.device, model)
        opened = open_base(model, base, processing_class)
        if processing_class is not None or opened.model is not None:
            check_vocabulary(opened.tokenizer, opened.base, opened.model)
        self.preparation = Preparation.for_run(
            opened.tokenizer,
            data_settings or DataSettings(),
            max_length=args.max_length,
            overlong=args.overlong,
            ends=opened.ends(),
            formatting_func=formatting_func,
        )
        self.rows = self.preparation.rows(train_dataset)
        self.generated_metrics = generated_metrics
        with sharded.built_whole(args):
            choice = choose_memory(
                opened.source,
                args,
                row_lengths(self.rows.table),
                adapter_given=peft_config is not None,
                overhead=before,
            )
        args = choice.applied(args)
        self.assembly = assembly = assemble(
            opened, args, peft_config, choice.preset, choice.attention.partition(":")[0]
        )
        self.meter = RunMeter(PeakMemory(args.device))
        self.memory_choice, self.base, self.packing = choice, opened.base, assembly.packing
        self.step_loss = StepLoss(assembly, args)
        self.data_name = Path(train_dataset).name if isinstance(train_dataset, str | Path) else "rows in memory"
        padded = PaddedCollator(opened.tokenizer.pad_token_id)
        trainer_keywords.setdefault("data_collator", PackedCollator() if self.packing.packs else padded)
        self._evaluated: EvaluationSums | None = None
        super().__init__(
            assembly.model,
            args,
            train_dataset=self.rows.table,
            eval_dataset=self.preparation.sets(eval_dataset),
            processing_class=opened.tokenizer,
            **trainer_keywords,
        )
        # Our loss is divided by the tokens of the whole accumulated batch already.
        self.loss_is_scaled_for_ga = True
        self._watch_the_run()

    def _watch_the_run(self) -> None:
        self.pop_callback(PrinterCallback)
        self.guard = RunGuard(self)
        # The meter begins before the guard's trials, which are part of the run's time.
        self.add_callback(MetricsCallback(self.meter))
        self.add_callback(self.guard)
        self.progress = ProgressCallback(self.meter) if self.args.show_progress else None
        if self.progress:
            self.add_callback(self.progress)
        say = self.progress.say if self.progress else logger.info
        self.memory_report = MemoryReport(self.memory_choice, self.meter.memory, say)
        self.add_callback(self.memory_report)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the `Trainer` does; SIGTERM saves a checkpoint and returns after the step it came in.

        Raises:
            OutOfMemoryError: memory ran out, and `on_out_of_memory` is "stop" or nothing less is left to try.
        """
        try:
            with self.guard.listening():
                while True:
                    try:
                        return super().train(resume_from_checkpoint, *args, **kwargs)
                    except (RuntimeError, MemoryError, OutOfMemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        self._yield_memory(error)
                    # Outside the handler, whose traceback still holds the tensors of the step.
                    resume_from_checkpoint = self.checkpoint_to_go_on_from()
        finally:
            if self.progress:
                self.progress.close()
            if self.state.log_history and self.is_world_process_zero():
                # Also of a run that was stopped: there it says most.
                draw_losses(self.state.log_history, Path(str(self.args.output_dir)) / PLOT_FILE)

    def _yield_memory(self, error: BaseException) -> None:
        self.memory_choice = with_less(self.args, self.memory_choice, error)
        self._train_batch_size = self.args.train_batch_size
        self.memory_report.choice = self.memory_choice
        self.memory_report.say(self.memory_choice.reasons[-1])

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: list[str] = self._signature_columns or []
        if WEIGHTS_COLUMN not in names:
            # The collator reads them, though the model's forward does not. transformers types the list as None.
            self._signature_columns = [*names, WEIGHTS_COLUMN]  # type: ignore[assignment]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer as the `Trainer` does, or with LoRA+ learning rates when they are asked for."""
        if self.args.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self.optimizer = loraplus_optimizer(self.model, self.args)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum the loss of the valid tokens and divide once, by those of the whole accumulated, gathered batch."""
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.guard.check_batch(inputs)
        total, valid, outputs = self.step_loss.sum(model, inputs)
        count = valid if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Data-parallel engines average gradients over processes; the division above is by all their tokens.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self.meter.count(inputs)
            if not torch.isfinite(loss):
                raise NonFiniteLossError(describe_failure(self, loss, inputs))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate one batch: sums alone, without logits, unless a metric asks for predictions."""
        if "labels" not in inputs or self.compute_loss_func is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            inputs = without_repeats(self.accelerator, inputs)
            total, valid, _ = self.step_loss.sum(model, inputs, self._evaluated or EvaluationSums())
            loss = (total / valid.clamp(min=1)).float()
            if prediction_loss_only:
                return loss, None, None
            padded = unpack(inputs, self.processing_class.pad_token_id)
            labels = padded.pop("labels")
            return loss, model(**padded).logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the `Trainer` does, with means over tokens instead of over batches."""
        self._evaluated, prefix = EvaluationSums(), kwargs.get("metric_key_prefix", "eval")
        try:
            output = super().evaluation_loop(*args, **kwargs)
            # Every process takes part, also one whose rows were all repeats.
            gathered = self.accelerator.gather(self._evaluated.sums[None].to(self.args.device, torch.float64))
            self._evaluated.sums = gathered.sum(0).cpu()
            assert output.metrics is not None, "the loop always reports its time"
            if self._evaluated.sums[0] > 0:
                output.metrics.update(self._evaluated.metrics(prefix))
            if self.generated_metrics is not None:
                model = self.accelerator.unwrap_model(self.model)
                output.metrics.update(self.generated_metrics.measure(model, self.processing_class, prefix))
            return output
        finally:
            self._evaluated = None

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter to `folder`: PEFT's two files, the training record and the probes; whole or not at all.

        Every process calls it, the first one writes.

        Raises:
            ConfigurationError: `folder` is there already and is not empty, or the run trained no adapter.
            ResourceError: it cannot be written.
        """
        return save_adapter(self, Path(folder))

    def record(self) -> TrainingRecord:
        """Return the record of the run so far."""
        return make_record(self)
