"""The trainer: a `Trainer` in every respect, whose loss never builds the logits and whose result is an adapter.

Knows how a step is made and what is kept of a run. Rows, tokens, batches, proofs, records and files are other modules'
work.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.canary import write_canary
from adapterhub_lite.errors import ConfigurationError, NonFiniteLossError
from adapterhub_lite.losses import causal_lm_loss, head_of
from adapterhub_lite.record import TrainingRecord
from adapterhub_lite.training import checkpoints
from adapterhub_lite.training.adapters import save_peft, write_adapter
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.assembly import assemble, plain
from adapterhub_lite.training.collation import PackedCollator, PaddedCollator, unpack
from adapterhub_lite.training.evaluation import EvaluationSums, without_repeats
from adapterhub_lite.training.guard import RunGuard
from adapterhub_lite.training.measurement import PeakMemory
from adapterhub_lite.training.packing import segment_inputs
from adapterhub_lite.training.progress import MetricsCallback, ProgressCallback, RunMeter
from adapterhub_lite.training.recording import RunFacts, make_record, write_record
from adapterhub_lite.training.tokenization import IGNORED, prepare_rows


class AdapterTrainer(Trainer):
    """Trains a LoRA on a frozen base and saves it as a plain PEFT folder with the record of its making.

    `model` is a base's name, its folder, a model in memory, or a `PeftModel`; `train_dataset` and `eval_dataset` are
    tokenised data sets, or anything that `load_rows` takes; `base` says where a model in memory came from, for the
    record. Every other keyword is the `Trainer`'s own.

    Raises:
        DataError: a row is not what was wanted.
        ConfigurationError: model, tokenizer and arguments do not fit together.
        TrainingError: while training, the run was found to be wrong; see its subclasses.
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
        self.assembly = assembly = assemble(model, args, processing_class, peft_config, base)
        self.base, self.packing, tokenizer = assembly.base, assembly.packing, assembly.tokenizer
        self.data_name = Path(train_dataset).name if isinstance(train_dataset, str | Path) else "rows in memory"
        prepare = partial(prepare_rows, tokenizer=tokenizer, max_length=args.max_length, overlong=args.overlong)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(rows) for name, rows in eval_dataset.items()}
        padded = PaddedCollator(tokenizer.pad_token_id)
        trainer_keywords.setdefault("data_collator", PackedCollator() if self.packing.packs else padded)
        self._evaluated: EvaluationSums | None = None
        self._staged: Path | None = None
        self._push_later = False
        super().__init__(
            assembly.model,
            args,
            train_dataset=prepare(train_dataset),
            eval_dataset=eval_dataset if isinstance(eval_dataset, dict) else prepare(eval_dataset),
            processing_class=tokenizer,
            **trainer_keywords,
        )
        # Our loss is divided by the tokens of the whole accumulated batch already.
        self.loss_is_scaled_for_ga = True
        self._watch_the_run()

    def _watch_the_run(self) -> None:
        if self.args.n_gpu > 1:
            raise ConfigurationError(
                f"{self.args.n_gpu} GPUs are visible and one process was started. Start one process a GPU with "
                "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
            )
        self.pop_callback(PrinterCallback)
        self.guard = RunGuard(self)
        self.add_callback(self.guard)
        self.add_callback(MetricsCallback(self.meter))
        self.progress = ProgressCallback(self.meter) if self.args.show_progress else None
        if self.progress:
            self.add_callback(self.progress)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the `Trainer` does; SIGTERM saves a checkpoint and returns after the step it came in."""
        try:
            with self.guard.listening():
                return super().train(*args, **kwargs)
        finally:
            if self.progress:
                self.progress.close()

    def loss_sum(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        sums: EvaluationSums | None = None,
        smoothing: float | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Return (sum of the loss over valid tokens, how many there are, the model's output without its logits).

        `inputs` holds `labels` (batch, seq) with -100 where nothing is learned. With `sums`, accuracy and entropy are
        taken on the way, and there is no gradient. `smoothing` None is that of the arguments.
        """
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        if self.packing.packs and "position_ids" in rest and "attention_mask" not in rest:
            rest = segment_inputs(rest)
        hidden, outputs = self.assembly.hidden_states.of(model, rest)
        # The labels move, not the states: the states' slice would be a copy.
        goals = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        valid = (goals != IGNORED).sum()
        head = head_of(self.model)
        if sums is not None:
            return sums.add(head, hidden.flatten(0, 1), goals.flatten()), valid, outputs
        total = causal_lm_loss(
            head,
            hidden,
            goals,
            shift=False,
            reduction="sum",
            choice=self.assembly.loss,
            label_smoothing=self.args.label_smoothing_factor if smoothing is None else smoothing,
            chunk_tokens=self.args.loss_chunk_tokens,
        )
        return total, valid, outputs

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
        total, valid, outputs = self.loss_sum(model, inputs)
        count = valid if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Data-parallel engines average gradients over processes; the division above is by all their tokens.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self.meter.count(inputs)
            if not torch.isfinite(loss):
                raise NonFiniteLossError(self._describe_failure(loss, inputs))
        return (loss, outputs) if return_outputs else loss

    def _describe_failure(self, loss: Tensor, inputs: dict[str, Any]) -> str:
        begins = self.processing_class.decode(inputs["input_ids"][0, :24])
        return (
            f"The loss became {loss.item()} at step {self.state.global_step + 1}, in the batch that begins {begins!r}. "
            f"Checkpoints in {self.args.output_dir} are from before and were kept. Lower the learning rate (now "
            f"{self._get_learning_rate():.2g}), or look at the rows of that batch."
        )

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
            total, valid, _ = self.loss_sum(model, inputs, self._evaluated or EvaluationSums())
            loss = (total / valid.clamp(min=1)).float()
            if prediction_loss_only:
                return loss, None, None
            padded = unpack(inputs, self.processing_class.pad_token_id)
            labels = padded.pop("labels")
            return loss, model(**padded).logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the `Trainer` does, with means over tokens instead of over batches."""
        self._evaluated = EvaluationSums()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            # Every process takes part, also one whose rows were all repeats.
            gathered = self.accelerator.gather(self._evaluated.sums[None].to(self.args.device, torch.float64))
            self._evaluated.sums = gathered.sum(0).cpu()
            if self._evaluated.sums[0] > 0:
                assert output.metrics is not None, "the loop always reports its time"
                output.metrics.update(self._evaluated.metrics(kwargs.get("metric_key_prefix", "eval")))
            return output
        finally:
            self._evaluated = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staged or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.sweep(run)
        self.accelerator.wait_for_everyone()
        self._staged, self._push_later = run / checkpoints.STAGING, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staged, self._staged = self._staged, None
        if self.state.best_model_checkpoint == str(staged / name):
            self.state.best_model_checkpoint = str(run / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / name / "trainer_state.json"))
            checkpoints.seal(staged / name, self._adapter_tensors())
            checkpoints.publish(staged / name, run / name)
            checkpoints.sweep(run)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                str(run), save_total_limit=self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self._push_later:
            super()._push_from_checkpoint(str(run / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # What is still being written is not pushed; `_save_checkpoint` does it once the checkpoint is whole.
        self._push_later = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        wanted = checkpoints.verify(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if wanted is not None:
            checkpoints.check_loaded(wanted, self._adapter_tensors(), folder)

    def _adapter_tensors(self) -> dict[str, Tensor]:
        adapted = self.accelerator.unwrap_model(self.model)
        name = adapted.active_adapter
        return dict(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_peft(self.accelerator.unwrap_model(self.model), folder, state_dict)

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter to `folder`: PEFT's two files, the training record and the canary; whole or not at all.

        Raises:
            ConfigurationError: `folder` is there already and is not empty.
            ResourceError: it cannot be written.
        """

        def witness(aside: Path) -> None:
            write_record(self.record(), aside)
            write_canary(adapted, self.processing_class, aside)

        with plain(self.assembly) as adapted:
            return write_adapter(adapted, Path(folder), also=witness)

    def record(self) -> TrainingRecord:
        """Return the record of the run so far."""
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        return make_record(
            RunFacts(
                model=self.accelerator.unwrap_model(self.model),
                base=self.base,
                args=self.args,
                table=self.train_dataset,
                data_name=self.data_name,
                tokenizer=self.processing_class,
                ways=self.assembly.record(),
                peak_bytes=self.meter.memory.peak_bytes(),
                steps=self.state.global_step,
                final_loss=losses[-1] if losses else None,
                seconds=self.meter.seconds,
            )
        )
