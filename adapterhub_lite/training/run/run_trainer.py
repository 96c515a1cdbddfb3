"""The `Trainer` of an adapter's run as its guard, record and memory see it: the parts they ask for, and whole checkpoints.

Knows what a checkpoint holds under each engine; nothing of data, and not how a step is made.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.preparation import Preparation
from adapterhub_lite.training.data.tokenization import TokenizedRows
from adapterhub_lite.training.distributed import sharded
from adapterhub_lite.training.model.adapters import OpenedBase, save_kept, whole_tensors
from adapterhub_lite.training.model.assembly import Assembly
from adapterhub_lite.training.model.master_weights import MasterWeights
from adapterhub_lite.training.run import checkpoints, optimizer_state
from adapterhub_lite.training.run.measurement import RunMeter
from adapterhub_lite.training.run.memory_choice import MemoryChoice
from adapterhub_lite.training.run.progress import MetricsCallback
from adapterhub_lite.training.run.step_loss import StepLoss


class RunTrainer(Trainer):
    """A `Trainer` with the parts of an adapter's run, whose checkpoints appear whole, are sealed by hashes and verified.

    `preparation` made tokens of rows, `rows` is what became of the training rows, `data_name` the name they go by in the record.
    """

    args: AdapterTrainingArguments
    model: nn.Module
    processing_class: PreTrainedTokenizerBase
    preparation: Preparation
    rows: TokenizedRows
    data_name: str
    base: ResolvedBase | None
    opened: OpenedBase
    assembly: Assembly
    memory_choice: MemoryChoice
    meter: RunMeter
    step_loss: StepLoss
    masters: MasterWeights | None = None
    own_collator: object = None
    describe_checkpoint: Callable[[Path], object] = staticmethod(lambda _: None)
    _staged: Path | None = None
    _push_later = False

    def bare_model(self) -> nn.Module:
        """The model without what an engine has wrapped around it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def collates_itself(self) -> bool:
        """Whether batches are made by the collator that the run chose, and not by one of the user's."""
        return self.data_collator is self.own_collator

    def checkpoint_to_go_on_from(self) -> str | None:
        """The last checkpoint of a run that memory ran out in; where there is none, what is whole is saved as one now."""
        self.model.zero_grad(set_to_none=True)
        if self.state.global_step == 0:
            self.optimizer = self.lr_scheduler = None
            return None
        folder = str(self.args.output_dir)
        if get_last_checkpoint(folder) is None:
            # The step that failed changed no weight: forward and backward come before the optimizer.
            self._save_checkpoint(self.model, None)
        return get_last_checkpoint(folder)

    # A trial is whatever the search's own library makes of it.
    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staged or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.sweep(run)
        self.accelerator.wait_for_everyone()
        # A checkpoint of another trainer says nothing of callbacks that it did not have.
        known: Any = self.state.stateful_callbacks
        for one in (*self.callback_handler.callbacks, self.control):
            if isinstance(one, ExportableState):
                known.setdefault(type(one).__name__, one.state())
        self._staged, self._push_later = run / checkpoints.STAGING, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staged, self._staged = self._staged, None
        self._publish(staged / name, run / name)
        if self._push_later:
            super()._push_from_checkpoint(str(run / name))

    def _publish(self, staged: Path, target: Path) -> None:
        """Seal the checkpoint in `staged`, move it to `target`, and drop old ones; every process calls it."""
        state, args = self.state, self.args
        if state.best_model_checkpoint == str(staged):
            state.best_model_checkpoint = str(target)
        self.accelerator.wait_for_everyone()
        kept = whole_tensors(self.bare_model())
        if args.should_save:
            state.save_to_json(str(staged / "trainer_state.json"))
            self.describe_checkpoint(staged)
            checkpoints.seal(staged, kept)
            checkpoints.publish(staged, target)
            checkpoints.sweep(target.parent)
            best, limit = state.best_model_checkpoint, args.save_total_limit
            rotate_checkpoints(str(target.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # What is still being written is not pushed; `_save_checkpoint` does it once the checkpoint is whole.
        self._push_later = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        sealed = checkpoints.verify(folder)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ConfigurationError(
                f"The checkpoint {folder} holds an adapter of another shape than this run's: give the rank and the "
                "target_modules that it was trained with."
            ) from error
        if sealed is not None:
            checkpoints.check_loaded(sealed, whole_tensors(self.bare_model()), folder)

    def _load_callback_state(self) -> None:
        # transformers makes callbacks anew, which one that holds a part of the run cannot be; it reads its own state.
        kept: Any = self.state.stateful_callbacks
        own = kept.pop(MetricsCallback.__name__, None)
        super()._load_callback_state()
        if own is not None:
            kept[MetricsCallback.__name__] = own

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharded.splits_states(self):
            super()._save_optimizer_and_scheduler(output_dir)
            if self.masters is not None and self.args.should_save:
                self.masters.save(Path(output_dir), self._names())
            return
        # An engine's own checkpoint can only be read under the same engine, if not by as many processes.
        optimizer_state.save_state(self, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / optimizer_state.STATE_FILE).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self.masters is not None:
                self.masters.load(Path(checkpoint), self._names())
            return
        optimizer_state.load_state(self, Path(checkpoint))

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.bare_model().named_parameters()}

    # What is handed on belongs to transformers' own private signature.
    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: Any
    ) -> Any:
        if resume_from_checkpoint is None or not sharded.splits_states(self):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        optimizer_state.load_checkpoint(self, Path(resume_from_checkpoint))
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write PEFT's two files; where an engine splits the model, only the adapter's tensors are gathered."""
        if not sharded.splits_states(self):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, whole_tensors(self.bare_model()))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # The rest is transformers' own.
    def create_model_card(self, *args: Any, dataset_name: str | list[str] | None = None, **kwargs: Any) -> None:
        """Draft a model card as the `Trainer` does; `dataset_name` is what TRL's scripts call its `dataset`."""
        if dataset_name is not None:
            kwargs.setdefault("dataset", dataset_name)
        super().create_model_card(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_kept(self.bare_model(), folder, state_dict)
            # What others look for beside the weights.
            self.processing_class.save_pretrained(str(folder))
            args = copy.copy(self.args)
            args.hub_token = None
            torch.save(args, folder / TRAINING_ARGS_NAME)
