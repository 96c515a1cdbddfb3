"""Writes down what a run was. Knows the record's schema and where each of its facts lies."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.adapter_format.record import RECORD_FILE, BaseRecord, DataRecord, MemoryRecord, TrainingRecord
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.chat_template import template_digest
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.tokenization import rows_fingerprint
from adapterhub_lite.training.run.measurement import describe_hardware

if TYPE_CHECKING:
    from adapterhub_lite.training.trainer import AdapterTrainer

PACKAGES = ("adapterhub-lite", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes")
# Of the loss curve: a long run is thinned.
MOST_POINTS = 500
# Where a run is, not what it is; and fields that would put a secret into a file that is published.
LEFT_OUT = frozenset({"output_dir", "logging_dir", "hub_token", "push_to_hub_token", "run_name", "local_rank"})


def describe_base(base: ResolvedBase | None, model: Any) -> BaseRecord:
    """Say which base a run started from; a model that came without one is identified by its weights in memory."""
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    method = None if quantization is None else json.dumps(_plain(quantization), sort_keys=True, default=str)
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
        if "lora_" not in name:
            flat = parameter.detach().cpu().contiguous().flatten()
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return BaseRecord(
        id=config._name_or_path or type(inner).__name__,
        fingerprint=f"memory:{digest.hexdigest()}",
        quantization=method,
    )


def _plain(quantization: Any) -> Any:
    return quantization.to_dict() if hasattr(quantization, "to_dict") else quantization


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


@dataclass(frozen=True)
class RunFacts:
    """What a finished run knows of itself; `ways` says which faster ways it took, and why."""

    model: Any
    base: ResolvedBase | None
    args: AdapterTrainingArguments
    table: Any
    data_name: str
    truncated: int
    dropped: int
    tokenizer: PreTrainedTokenizerBase
    ways: dict[str, str]
    preset: str
    predicted_bytes: int | None
    peak_bytes: int
    steps: int
    losses: tuple[tuple[int, float], ...]
    seconds: float


def facts_of(trainer: "AdapterTrainer") -> RunFacts:
    """What `trainer` knows of its run so far."""
    choice = trainer.memory_choice
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return RunFacts(
        model=trainer.accelerator.unwrap_model(trainer.model),
        base=trainer.base,
        args=trainer.args,
        table=trainer.train_dataset,
        data_name=trainer.data_name,
        truncated=trainer.rows.truncated,
        dropped=trainer.rows.dropped,
        tokenizer=trainer.processing_class,
        ways={**trainer.assembly.record(), **choice.record()},
        preset=choice.preset.name,
        predicted_bytes=None if choice.predicted is None else choice.predicted.total,
        peak_bytes=trainer.meter.peak_bytes,
        steps=trainer.state.global_step,
        losses=tuple((int(line["step"]), float(line["loss"])) for line in lines),
        seconds=trainer.meter.seconds,
    )


def make_record(facts: RunFacts) -> TrainingRecord:
    """Return the record of a run."""
    args, table = facts.args, facts.table
    countable = isinstance(table, Dataset)
    adapter = facts.model.active_peft_config.to_dict() if isinstance(facts.model, PeftModel) else {}
    return TrainingRecord(
        base=describe_base(facts.base, facts.model),
        data=DataRecord(
            id=facts.data_name,
            rows=len(table) if countable else 0,
            fingerprint=rows_fingerprint(table) if countable else "not countable",
            truncated=facts.truncated,
            dropped=facts.dropped,
        ),
        template_digest=template_digest(facts.tokenizer),
        seeds={"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed},
        hyperparameters=hyperparameters(args, adapter),
        packages=packages(),
        preset=facts.preset,
        loss_backend=facts.ways,
        memory=MemoryRecord(predicted_bytes=facts.predicted_bytes, measured_peak_bytes=facts.peak_bytes),
        hardware=describe_hardware(args.device),
        steps=facts.steps,
        final_loss=facts.losses[-1][1] if facts.losses else None,
        loss_curve=facts.losses[:: 1 + len(facts.losses) // MOST_POINTS],
        wall_seconds=facts.seconds,
    )


def write_record(record: TrainingRecord, folder: Path) -> Path:
    """Write the record beside the adapter in `folder`."""
    path = folder / RECORD_FILE
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path
