"""From a base model to one that trains a LoRA, and back to a plain PEFT folder. Knows PEFT, nothing of data."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from adapterhub_lite.bases import ResolvedBase, load_base_model, resolve_base
from adapterhub_lite.errors import ConfigurationError, ResourceError
from adapterhub_lite.training.arguments import AdapterTrainingArguments


def open_base(model: Any, base: ResolvedBase | None) -> tuple[Any, ResolvedBase | None]:
    """Return (model in memory, the base it came from if known); `model` is a name, a folder, or a model already."""
    if isinstance(model, str | Path):
        base = base or resolve_base(model)
        return load_base_model(base.folder), base
    if base is None and isinstance(model, PreTrainedModel):
        origin = Path(model.config._name_or_path or "/nowhere")
        if (origin / "config.json").is_file():
            base = resolve_base(origin)
    return model, base


def with_adapter(
    model: Any, args: AdapterTrainingArguments, peft_config: PeftConfig | None, base: ResolvedBase | None
) -> PeftModel:
    """Put a fresh LoRA on `model`, drawn with `args.seed`; a model that has one already is returned as it is.

    Raises:
        ConfigurationError: no layer is called like `target_modules`, or nothing of the adapter can be trained.
    """
    if isinstance(model, PeftModel):
        _require_trainable(model)
        return model
    config = peft_config or LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.target_modules,
        task_type="CAUSAL_LM",
    )
    # Before the adapter is drawn: the Trainer's own seeding comes too late for A.
    set_seed(args.seed)
    try:
        # PEFT keeps the adapter in fp32 then: the weights that the optimizer moves by small steps.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ConfigurationError(f"The LoRA does not fit {type(model).__name__}: {error}") from error
    if base is not None:
        config.base_model_name_or_path = base.model_id
        config.revision = base.revision
    _require_trainable(adapted)
    return adapted


def _require_trainable(model: PeftModel) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            "Nothing of this PeftModel can be trained: all its parameters are frozen. "
            "Load the adapter with is_trainable=True."
        )


def write_adapter(model: PeftModel, folder: Path, also: Callable[[Path], object] = lambda _: None) -> Path:
    """Write the adapter as a plain PEFT folder that appears whole, by one rename; `also` may add files to it.

    Raises:
        ConfigurationError: `folder` is there already and is not empty.
        ResourceError: it cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigurationError(f"The folder {folder} is not empty. Give a new one, so that nothing is overwritten.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            save_peft(model, aside)
            also(aside)
            aside.chmod(0o755)
            if folder.is_dir():
                folder.rmdir()
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ResourceError(f"The adapter could not be written to {folder}: {error.strerror or error}.") from error
    return folder


def save_peft(model: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write PEFT's two files of the active adapter into `folder` itself, and nothing of the base."""
    name = model.active_adapter
    # "auto" would ask the hub whether the vocabulary was resized.
    model.save_pretrained(str(folder), state_dict=state_dict, selected_adapters=[name], save_embedding_layers=False)
    nested = folder / name
    if name != "default" and nested.is_dir():
        for file in nested.iterdir():
            file.replace(folder / file.name)
        nested.rmdir()
    (folder / "README.md").unlink(missing_ok=True)
