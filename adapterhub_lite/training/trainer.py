"""The trainer: a `Trainer` in every respect, whose loss never builds the logits and whose result is an adapter.

Knows how a step is made and what is kept of a run. Rows, tokens, batches, proofs, records and files are other modules'
work.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from adapterhub_lite.adapter_format.manifest import TrainingRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.encoding import padding_id
from adapterhub_lite.devices import keep_little_code
from adapterhub_lite.errors import ConfigurationError, NonFiniteLossError, OutOfMemoryError
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.collation import PaddedCollator
from adapterhub_lite.training.data.rows import Formatting
from adapterhub_lite.training.data.tokenization import WEIGHTS_COLUMN, row_lengths
from adapterhub_lite.training.distributed import sharded
from adapterhub_lite.training.evaluation import GeneratedMetrics
from adapterhub_lite.training.model.adapters import loraplus_optimizer, open_base, to_be_planned
from adapterhub_lite.training.model.assembly import assemble
from adapterhub_lite.training.model.master_weights import MasterWeights
from adapterhub_lite.training.model.segments import PackingChoice
from adapterhub_lite.training.run.guard import RunGuard, describe_failure
from adapterhub_lite.training.run.measurement import MemoryReport, PeakMemory, RunMeter
from adapterhub_lite.training.run.memory_choice import choose_memory, is_out_of_memory, with_less
from adapterhub_lite.training.run.progress import PLOT_FILE, MetricsCallback, ProgressCallback, draw_losses
from adapterhub_lite.training.run.record import make_record, save_adapter
from adapterhub_lite.training.run.rows_trainer import preparation_for, sorted_out, with_words
from adapterhub_lite.training.run.search_trainer import SearchTrainer
from adapterhub_lite.training.run.step_loss import (
    EvaluationSums,
    PerRow,
    StepLoss,
    needs_round_lengths,
    without_repeats,
)
from adapterhub_lite.training.settings import DataSettings

logger = logging.getLogger(__name__)
# Methods of the `Trainer` that a subclass may write anew, and that then see batches as they were collated.
GIVEN_A_BATCH = ("compute_loss", "training_step", "prediction_step")


class AdapterTrainer(SearchTrainer):
    """Trains a LoRA on a frozen base and saves it as a plain PEFT folder with the record of its making.

    `model` is a base's name, its folder, a model in memory, or a `PeftModel`; without it, `model_init` makes one, anew for
    each `train()`. `args` may be a plain `TrainingArguments`, or TRL's `SFTConfig`. `train_dataset` and `eval_dataset` are
    tokenised data sets, or anything that `load_rows` takes, as are the sets given to `evaluate` and `predict`; `base` says
    where a model in memory came from, for the record; `generated_metrics` are asked in each evaluation. `data_settings`
    and `formatting_func` say how rows are read and laid out. Every other keyword is the `Trainer`'s own, or answered as
    `porting.ANSWERS` says.

    Raises:
        DataError: a row is not what was wanted.
        ConfigurationError: model, tokenizer and arguments do not fit together.
        TrainingError: while training, the run was found to be wrong; see its subclasses.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        *,
        base: ResolvedBase | None = None,
        generated_metrics: GeneratedMetrics | None = None,
        data_settings: DataSettings | None = None,
        formatting_func: Formatting | None = None,
        model_init: Callable[..., Any] | None = None,
        **trainer_keywords: Any,
    ) -> None:
        args, trainer_keywords, tokenizer = sorted_out(args, train_dataset, trainer_keywords)
        processing_class = processing_class or tokenizer
        if model is not None and model_init is not None:
            raise ConfigurationError("Give either a model or a model_init, which makes one.")
        self._user_init, self._peft_config = model_init, peft_config
        model = super().call_model_init() if model is None and model_init is not None else model
        if args.device.type == "cpu":
            keep_little_code()
        before = PeakMemory.before(args.device, model)
        self.opened = opened = with_words(
            open_base(model, base, processing_class), args, checked=processing_class is None
        )
        own_batches = trainer_keywords.get("data_collator") is None
        self.preparation = preparation_for(
            opened, args, data_settings or DataSettings(), formatting_func, own_batches=own_batches
        )
        self.rows = self.preparation.training_rows(train_dataset, args, own_batches=own_batches)
        self.generated_metrics = generated_metrics
        args = self._plan(args, trainer_keywords.get("compute_loss_func"), before)
        preset, attention = self.memory_choice.preset, self.memory_choice.attention.partition(":")[0]
        self.assembly = assembly = assemble(opened, args, peft_config, preset, attention, self.rows_read_by)
        self.base, self.step_loss, self.meter = opened.base, StepLoss(assembly, args), RunMeter(PeakMemory(args.device))
        self.data_name = Path(train_dataset).name if isinstance(train_dataset, str | Path) else "rows in memory"
        # Batches that the step does not make itself cannot be lengthened there.
        rounds = self.rows_read_by is not None and needs_round_lengths(assembly.model, args)
        self.padded = PaddedCollator(padding_id(opened.tokenizer), args.pad_to_multiple_of or 1, rounds=rounds)
        if own_batches:
            trainer_keywords["data_collator"] = self.own_collator = self.packed_or_padded()
        self._evaluated: EvaluationSums | None = None
        super().__init__(
            assembly.model,
            args,
            train_dataset=self.rows.table,
            eval_dataset=self.preparation.sets(eval_dataset),
            processing_class=opened.tokenizer,
            **trainer_keywords,
        )
        # transformers' type leaves out names and folders.
        self.model_init = model_init  # type: ignore[assignment]
        if type(self).compute_loss is AdapterTrainer.compute_loss and self.loss_is_scaled_for_ga is None:
            # Our loss is divided by the tokens of the whole accumulated batch already.
            self.loss_is_scaled_for_ga = True
        self._watch_the_run()

    def _plan(
        self, args: AdapterTrainingArguments, loss: Callable[..., Any] | None, held: int
    ) -> AdapterTrainingArguments:
        """Choose the memory preset, where the process holds `held` bytes already; return the arguments of the run."""
        if loss is not None and not isinstance(loss, PerRow):
            self.rows_read_by = "compute_loss_func is given a row per sequence"
        for name in GIVEN_A_BATCH:
            if getattr(type(self), name) is not getattr(AdapterTrainer, name):
                self.rows_read_by = f"{name} of a subclass is given a row per sequence"
        with sharded.built_whole(args):
            source, adapter = to_be_planned(self.opened.source, self.opened.added, args, self._peft_config)
            lengths = row_lengths(self.rows.table)
            self.memory_choice = choose_memory(source, args, lengths, adapter=adapter, overhead=held)
        return self.memory_choice.applied(args)

    @property
    def packing(self) -> PackingChoice:
        """Whether batches are laid out without padding, and why (not)."""
        return self.assembly.packing

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
                        output = super().train(resume_from_checkpoint, *args, **kwargs)
                        trial = kwargs.get("trial", args[0] if args else None)
                        if trial is not None and self.hp_search_backend is not None:
                            self.keep_trial(trial, output)
                        return output
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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer as the `Trainer` does, or with LoRA+ learning rates when they are asked for.

        What is trained in 16 bits gets fp32 copies for it to step, unless `master_weights` is off or an engine keeps them;
        accumulated gradients are then summed in fp32 too.
        """
        if self.args.loraplus_lr_ratio is None or self.optimizer is not None:
            made = super().create_optimizer(model)
        else:
            made = self.optimizer = loraplus_optimizer(self.model, self.args)
        if self.args.master_weights and sharded.engine_of(self.args) is None:
            if self.masters is not None:
                self.masters.sum_no_more()
            # transformers hands back what Accelerate has wrapped, when it trains again.
            self.masters = MasterWeights.put_into(getattr(made, "optimizer", made))
            if self.args.gradient_accumulation_steps > 1:
                self.masters.sum_in_fp32(lambda: bool(self.accelerator.sync_gradients))
        return made

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum the loss of the valid tokens and divide once, by those of the whole accumulated, gathered batch."""
        if self.compute_loss_func is not None and not isinstance(self.compute_loss_func, PerRow):
            inputs = {name: value for name, value in inputs.items() if name != WEIGHTS_COLUMN}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(self.compute_loss_func, PerRow):
            rows, outputs = self.step_loss.by_row(model, inputs)
            loss = self.compute_loss_func.function(rows, num_items_in_batch)
        else:
            total, valid, outputs = self.step_loss.sum(model, inputs, logits=return_outputs)
            count = valid if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        router = self.step_loss.router(outputs)
        loss = loss if router is None else loss + router.to(loss.device)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Data-parallel engines average gradients over processes; the division above is by all their tokens.
            loss = loss * self.accelerator.num_processes
        if model.training and not torch.isfinite(loss):
            raise NonFiniteLossError(describe_failure(self, loss, inputs))
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make a step as the `Trainer` does; the batch is checked and counted before."""
        self.guard.check_batch(inputs)
        self.meter.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    # What is given is transformers' own, private business.
    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count what is learned in an accumulated batch, also for a model that would not ask for it: our loss does."""
        if type(self).compute_loss is not AdapterTrainer.compute_loss or self.compute_loss_func is not None:
            return super()._get_num_items_in_batch(batch_samples, device)
        asks, shifts = self.model_accepts_loss_kwargs, self._loss_shifts_labels
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        try:
            return super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.model_accepts_loss_kwargs, self._loss_shifts_labels = asks, shifts

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate one batch: sums alone, without logits, unless a metric asks for predictions."""
        own = type(self).compute_loss is AdapterTrainer.compute_loss and self.compute_loss_func is None
        # What a metric is to see beside the labels is in padded batches, and nobody looks into packed ones.
        names = self.label_names or ["labels"]
        if not prediction_loss_only and any(inputs.get(name) is None for name in names):
            own = False
        if inputs.get("labels") is None or not own:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            inputs = without_repeats(self.accelerator, inputs)
            sums = self._evaluated or EvaluationSums()
            total, valid, outputs = self.step_loss.sum(model, inputs, sums, logits=not prediction_loss_only)
            loss = (total / valid.clamp(min=1)).float()
            if prediction_loss_only:
                return loss, None, None
            labels = tuple(inputs[name] for name in names)
            return loss, outputs.logits, labels if len(labels) > 1 else labels[0]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the `Trainer` does, with means over tokens instead of over batches; a metric of the user's stays."""
        self._evaluated, prefix = EvaluationSums(), kwargs.get("metric_key_prefix", "eval")
        compute, own = self.compute_metrics, set[str]()

        def noted(*found: Any, **named: Any) -> Any:
            assert compute is not None, "it stands in for one"
            metrics = compute(*found, **named)
            own.update(metrics or ())
            return metrics

        self.compute_metrics = noted if compute is not None else None
        try:
            output = super().evaluation_loop(*args, **kwargs)
            # Every process takes part, also one whose rows were all repeats.
            gathered = self.accelerator.gather(self._evaluated.sums[None].to(self.args.device, torch.float64))
            self._evaluated.sums = gathered.sum(0).cpu()
            assert output.metrics is not None, "the loop always reports its time"
            if self._evaluated.sums[0] > 0:
                # The `Trainer` has put its mean over batches under one of these names itself.
                theirs = set(output.metrics) - ({f"{prefix}_loss"} if "loss" not in own else set())
                ours = self._evaluated.metrics(prefix)
                output.metrics.update({name: value for name, value in ours.items() if name not in theirs})
            if self.generated_metrics is not None:
                model = self.accelerator.unwrap_model(self.model)
                output.metrics.update(self.generated_metrics.measure(model, self.processing_class, prefix))
            return output
        finally:
            self._evaluated, self.compute_metrics = None, compute

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
