"""What a run leaves: the record of what it was, and the adapter's folder with it and with probes."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from adapterhub_lite.adapter_format.manifest import (
    RECORD_FILE,
    BaseRecord,
    DataRecord,
    MemoryRecord,
    TextRecord,
    TrainingRecord,
)
from adapterhub_lite.adapter_format.probes import write_probes
from adapterhub_lite.adapter_format.quantization import Quantization
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.chat.template import template_digest
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.reading.tables import Dataset
from adapterhub_lite.training.data.tokenization import rows_fingerprint
from adapterhub_lite.training.data.vocabulary import write_words
from adapterhub_lite.training.distributed.sharded import splits_weights
from adapterhub_lite.training.model.adapters import whole_tensors, write_adapter, write_plain
from adapterhub_lite.training.model.assembly import plain
from adapterhub_lite.training.run.measurement import describe_hardware
from adapterhub_lite.training.run.run_trainer import RunTrainer

PACKAGES = ("adapterhub-lite", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes")
# PEFT's own parameters in a model, and what it puts around the base's.
TRAINED = re.compile(r"lora_|\.modules_to_save\.|trainable_tokens_delta")
WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
# Of the loss curve: a long run is thinned.
MOST_POINTS = 500
# Where a run is, not what it is; and fields that would put a secret into a file that is published.
LEFT_OUT = frozenset({"output_dir", "logging_dir", "hub_token", "push_to_hub_token", "run_name", "local_rank"})


def describe_base(base: ResolvedBase | None, model: Any) -> BaseRecord:
    """Say which base a run started from; a model that came without one is identified by its weights in memory."""
    config = model.config
    method = Quantization.describe(getattr(config, "quantization_config", None))
    if base is not None:
        return BaseRecord(
            id=base.model_id,
            revision=base.revision,
            fingerprint=base.fingerprint,
            parts=base.parts,
            quantization=method,
        )
    digest = hashlib.sha256()
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, parameter in inner.named_parameters():
        if not TRAINED.search(name):
            flat = parameter.detach().cpu().contiguous().flatten()
            digest.update(WRAPPERS.sub("", name).encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return BaseRecord(
        id=config._name_or_path or type(inner).__name__,
        fingerprint=f"memory:{digest.hexdigest()}",
        quantization=method,
    )


def hyperparameters(args: AdapterTrainingArguments, peft: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of the run as JSON values, and the adapter's own configuration under `adapter`."""
    values = {key: value for key, value in args.to_dict().items() if key not in LEFT_OUT and "token" not in key}
    values["adapter"] = {key: sorted(value) if isinstance(value, set) else value for key, value in peft.items()}
    return json.loads(json.dumps(values, default=str))


def packages() -> dict[str, str]:
    """Return the versions of the packages that decide what a run computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def make_record(trainer: RunTrainer) -> TrainingRecord:
    """Return the record of what `trainer` has done so far."""
    args, choice, table = trainer.args, trainer.memory_choice, trainer.train_dataset
    model = trainer.bare_model()
    adapter = model.active_peft_config.to_dict() if isinstance(model, PeftModel) else {}
    losses = [(int(line["step"]), float(line["loss"])) for line in trainer.state.log_history if "loss" in line]
    return TrainingRecord(
        base=describe_base(trainer.base, model),
        data=DataRecord(
            id=trainer.data_name,
            rows=len(table) if isinstance(table, Dataset) else 0,
            fingerprint=rows_fingerprint(table) if isinstance(table, Dataset) else "not countable",
            truncated=trainer.rows.truncated,
            dropped=trainer.rows.dropped,
        ),
        template_digest=template_digest(trainer.processing_class),
        text=TextRecord(
            end_tokens=tuple(sorted(trainer.preparation.ends or ())),
            vocabulary=len(trainer.processing_class),
            special_tokens={name: str(token) for name, token in trainer.processing_class.special_tokens_map.items()},
            layouts=dict(trainer.rows.ways),
            prefill=trainer.rows.prefill,
        ),
        seeds={"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed},
        hyperparameters=hyperparameters(args, adapter),
        packages=packages(),
        preset=choice.preset.name,
        loss_backend={**trainer.assembly.record(), **choice.record()},
        memory=MemoryRecord(
            predicted_bytes=None if choice.predicted is None else choice.predicted.total,
            measured_peak_bytes=trainer.meter.peak_bytes,
        ),
        hardware=describe_hardware(args.device),
        steps=trainer.state.global_step,
        final_loss=losses[-1][1] if losses else None,
        loss_curve=tuple(losses[:: 1 + len(losses) // MOST_POINTS]),
        wall_seconds=trainer.meter.seconds,
    )


def write_record(record: TrainingRecord, folder: Path) -> Path:
    """Write the record beside the adapter in `folder`."""
    path = folder / RECORD_FILE
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def save_adapter(trainer: RunTrainer, folder: Path) -> Path:
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
    model: Any = trainer.bare_model()
    kind = model.active_peft_config.peft_type
    if str(getattr(kind, "value", kind)) != "LORA":
        raise ConfigurationError(
            "What was trained is no LoRA, which is all that is kept here. Keep it with save_model(folder)."
        )
    tensors = whole_tensors(trainer.bare_model())

    def witness(aside: Path) -> None:
        if trainer.assembly.initial is not None:
            write_plain(aside, trainer.assembly.initial)
        write_record(make_record(trainer), aside)
        write_words(trainer.processing_class, trainer.base, trainer.opened.added, aside)
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
