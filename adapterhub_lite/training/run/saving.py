"""What a run leaves: checkpoints, and at its end the adapter folder with its record and the witness of its answers."""

import tempfile
from pathlib import Path
from typing import Any

from transformers.trainer_utils import rotate_checkpoints

from adapterhub_lite.adapter_format.probes import write_probes
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.distributed.sharded import splits_weights, whole_tensors
from adapterhub_lite.training.model.adapters import write_adapter
from adapterhub_lite.training.model.assembly import plain
from adapterhub_lite.training.model.mutated_init import write_plain
from adapterhub_lite.training.run import checkpoints
from adapterhub_lite.training.run.recording import write_record


def publish_checkpoint(trainer: Any, staged: Path, target: Path) -> None:
    """Seal the checkpoint of an `AdapterTrainer` that lies in `staged`, move it to `target`, and let old ones go.

    Every process calls it, the first one writes.

    Raises:
        IntegrityError: a tensor does not read back as it is in memory.
    """
    state, args = trainer.state, trainer.args
    if state.best_model_checkpoint == str(staged):
        state.best_model_checkpoint = str(target)
    trainer.accelerator.wait_for_everyone()
    kept = whole_tensors(trainer.accelerator.unwrap_model(trainer.model))
    if args.should_save:
        state.save_to_json(str(staged / "trainer_state.json"))
        checkpoints.seal(staged, kept)
        checkpoints.publish(staged, target)
        checkpoints.sweep(target.parent)
        best, limit = state.best_model_checkpoint, args.save_total_limit
        rotate_checkpoints(str(target.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)
    trainer.accelerator.wait_for_everyone()


def save_adapter(trainer: Any, folder: Path) -> Path:
    """Write the adapter of an `AdapterTrainer` to `folder`. Every process calls it, the first one writes.

    Raises:
        ConfigurationError: `folder` is there already and is not empty, or the run trained no adapter.
        ResourceError: it cannot be written.
    """
    preset = trainer.memory_choice.preset
    if preset.trains != "lora":
        raise ConfigurationError(
            f"memory_preset={preset.name!r} trains the base itself, so there is no adapter to save. Keep the base with "
            "save_model(folder)."
        )
    tensors = whole_tensors(trainer.accelerator.unwrap_model(trainer.model))

    def witness(aside: Path) -> None:
        if trainer.assembly.initial is not None:
            write_plain(aside, trainer.assembly.initial)
        write_record(trainer.record(), aside)
        write_probes(adapted, trainer.processing_class, aside)

    with plain(trainer.assembly) as adapted:
        if trainer.args.should_save:
            write_adapter(adapted, folder, tensors, also=witness)
        elif splits_weights(trainer.args):
            # The witness runs the model, which is whole only with all processes.
            with tempfile.TemporaryDirectory() as aside:
                write_probes(adapted, trainer.processing_class, Path(aside))
    trainer.accelerator.wait_for_everyone()
    return folder
