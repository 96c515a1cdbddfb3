"""From a base model to one that trains a LoRA, and back to a plain PEFT folder. Knows PEFT, nothing of data.

An adapter whose beginning changed the base (PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775) is written so that the
untouched base can use it: PiSSA moves the largest singular directions W0 = s B0 A0 out of W into the adapter; what was
learned is the difference s (B A - B0 A0), which is a plain LoRA of twice the rank, [B, -B0] [A; A0].
"""

import copy
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from adapterhub_lite.adapter_format.added_tokens import AddedTokens
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapterhub_lite.bases import ResolvedBase, load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.bases.encoding import end_tokens
from adapterhub_lite.bases.load import no_progress_bars
from adapterhub_lite.errors import ConfigurationError, ResourceError
from adapterhub_lite.memory import TARGETS, MemoryPreset, build_model, give_back_freed_memory, prepare_for_training
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.distributed.sharded import gathered, whole
from adapterhub_lite.training.model.new_rows import grow, grown_config, training_rows

HALF_OF_A_PAIR = re.compile(r"\.lora_[AB]\.weight$")


@dataclass(frozen=True)
class OpenedBase:
    """A base before its weights are read: a model in memory, or where they lie; with the run's tokenizer.

    `added` are the tokens of that tokenizer which the base has not.
    """

    model: Any
    base: ResolvedBase | None
    tokenizer: PreTrainedTokenizerBase
    added: AddedTokens | None = None

    @property
    def source(self) -> Any:
        """What says most about the model now: itself in memory, else the base it will be read from."""
        return self.base if self.model is None else self.model

    def ends(self) -> frozenset[int]:
        """The ids that end an answer, for this base: its own and the tokenizer's."""
        model = self.model
        configs = [self.base.folder] if self.base else []
        return end_tokens(
            self.tokenizer, *configs, getattr(model, "generation_config", None), getattr(model, "config", None)
        )


def open_base(model: Any, base: ResolvedBase | None, tokenizer: PreTrainedTokenizerBase | None) -> OpenedBase:
    """Find the base of a run; `model` is a name, a folder, or a model in memory already.

    Raises:
        ConfigurationError: there is no model, or no tokenizer, or what was given for one is none.
        UnknownNameError: there is no such base.
    """
    if model is None:
        raise ConfigurationError(
            "The trainer wants a base: its name, its folder, a model in memory, a PeftModel, or a model_init that makes one."
        )
    if isinstance(model, str | Path):
        base, model = base or resolve_base(model), None
    elif base is None and isinstance(model, PreTrainedModel | PeftModel):
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        origin = Path(inner.config._name_or_path or "/nowhere")
        if (origin / "config.json").is_file():
            base = resolve_base(origin)
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        # A processor of several kinds of input: text is what is learned here.
        found = getattr(tokenizer, "tokenizer", None)
        if found is None:
            raise ConfigurationError(
                f"processing_class is a {type(tokenizer).__name__}, expected a tokenizer, or a processor that has one: "
                "AutoTokenizer.from_pretrained(...)."
            )
        tokenizer = found
    tokenizer = tokenizer or (load_tokenizer(base.folder) if base else None)
    if tokenizer is None:
        raise ConfigurationError("The trainer wants a tokenizer. Give it as processing_class.")
    return OpenedBase(model, base, tokenizer)


def to_be_planned(
    source: Any, added: AddedTokens | None, args: AdapterTrainingArguments, given: PeftConfig | None
) -> tuple[Any, PeftConfig | None]:
    """What a run is planned by: its base with the rows of `added` tokens, and its adapter where that says more than `args`.

    `source` is a model in memory or what `estimate_memory` takes, `given` the configuration that came along.
    """
    if given is None and isinstance(source, PeftModel):
        return source, source.active_peft_config
    if added is None:
        return source, given
    model = source
    if not isinstance(source, nn.Module):
        source = grown_config(source, added)
        with torch.device("meta"):
            model = build_model(source, dtype=torch.float32)
    config = given or lora_config_of(model, args)
    return source, training_rows(config, added, model, args, own=given is None)


def load_for(opened: OpenedBase, preset: MemoryPreset, attention: str, seed: int) -> Any:
    """Return the base's model as `preset` wants it, frozen where it does not train; rows of new tokens drawn by `seed`."""
    model = opened.model
    if isinstance(model, PeftModel):
        return model
    if model is None:
        assert opened.base is not None, "without a model there is a base"
        model = load_base_model(
            opened.base.folder,
            dtype=preset.torch_dtype,
            quantization_config=preset.quantization_config(),
            attn_implementation=attention,
        )
    config = model.config.get_text_config()
    if getattr(model, "is_quantized", False) and getattr(config, "altup_coef_clip", None) is not None:
        # Gemma 3n clamps frozen weights in each step of training, which packed ones cannot be; those it was released with lie
        # within. The model asks for None, which the field's type leaves out.
        vars(config)["altup_coef_clip"] = None
    grow(model, opened.added, seed)
    prepare_for_training(model, preset)
    if next(model.parameters()).device.type == "cpu":
        give_back_freed_memory(model, preset)
    if preset.trains == "head":
        model.get_output_embeddings().requires_grad_(True)
    return model


def with_adapter(
    model: Any, args: AdapterTrainingArguments, peft_config: PeftConfig | None, opened: OpenedBase
) -> PeftModel:
    """Put a fresh LoRA on the base's `model`, drawn with `args.seed`; one that has one already is returned as it is.

    Raises:
        ConfigurationError: no layer is called like `target_modules`, nothing of the adapter can be trained, or it is another
            than `peft_config` describes.
    """
    refuse_prompts(model.active_peft_config if isinstance(model, PeftModel) else peft_config)
    if isinstance(model, PeftModel):
        if peft_config is not None and peft_config.to_dict() != model.active_peft_config.to_dict():
            raise ConfigurationError(
                "The model has an adapter already, and peft_config describes another. Leave peft_config out to train the "
                "one that is there; for a new one on top of it, give model.merge_and_unload() as the model."
            )
        _require_trainable(model)
        return model
    config = copy.copy(peft_config) if peft_config is not None else lora_config_of(model, args)
    config = training_rows(config, opened.added, model, args, own=peft_config is None)
    # The base is a causal one; without a task type, PEFT writes the name of a class to import.
    config.task_type = "CAUSAL_LM"
    # Before the adapter is drawn: the Trainer's own seeding comes too late for A.
    set_seed(args.seed)
    try:
        # PEFT keeps the adapter in fp32 then: the weights that the optimizer moves by small steps.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ConfigurationError(f"The LoRA does not fit {type(model).__name__}: {error}") from error
    if opened.base is not None:
        config.base_model_name_or_path = opened.base.model_id
        config.revision = opened.base.revision
    _require_trainable(adapted)
    return adapted


def refuse_prompts(config: PeftConfig | None) -> None:
    """Refuse what learns virtual tokens: it changes where each label stands, and is not an adapter of weights.

    Raises:
        ConfigurationError: it is prompt tuning, prefix tuning or the like.
    """
    if config is not None and config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
        raise ConfigurationError(
            f"This is {kind}, which learns tokens in front of the text and not an adapter of weights: it can be neither "
            "trained nor kept here. Give a LoraConfig, or train it with transformers' own Trainer."
        )


def lora_config_of(model: nn.Module, args: AdapterTrainingArguments) -> LoraConfig:
    """The LoRA that the arguments describe, for `model`."""
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_names(model, args.target_modules),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=True if args.init_lora == "default" else args.init_lora,
        task_type="CAUSAL_LM",
    )


def target_names(model: nn.Module, wanted: str | list[str]) -> str | list[str]:
    """The names behind `attention` and `mlp` that this model has; everything else is PEFT's to understand."""
    if not isinstance(wanted, str) or wanted not in TARGETS:
        return wanted
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    # None of them: PEFT names the whole list in its complaint.
    return sorted(present.intersection(TARGETS[wanted])) or list(TARGETS[wanted])


def _require_trainable(model: PeftModel) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            "Nothing of this PeftModel can be trained: all its parameters are frozen. "
            "Load the adapter with is_trainable=True, or leave inference_mode out of its configuration."
        )


def write_adapter(
    model: PeftModel,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    also: Callable[[Path], object] = lambda _: None,
) -> Path:
    """Write the adapter as a plain PEFT folder that appears whole, by one rename; `also` may add files to it.

    `state_dict` holds its tensors where they are not whole in `model`.

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
            save_peft(model, aside, state_dict)
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
    """Write PEFT's two files of the active adapter into `folder` itself, and nothing of the base; a card there stays."""
    name = model.active_adapter
    card = folder / "README.md"
    before = card.read_bytes() if card.is_file() else None
    if state_dict is not None:
        state_dict = named_as_in_memory(model, state_dict)
    # "auto" would ask the hub whether the vocabulary was resized.
    with without_shape_warnings():
        model.save_pretrained(str(folder), state_dict=state_dict, selected_adapters=[name], save_embedding_layers=False)
    nested = folder / name
    if name != "default" and nested.is_dir():
        for file in nested.iterdir():
            file.replace(folder / file.name)
        nested.rmdir()
    if before is None:
        card.unlink(missing_ok=True)
    else:
        card.write_bytes(before)


def named_as_in_memory(model: PeftModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in an adapter's file, those of saved modules and tokens by the names that PEFT looks for."""
    named = dict(tensors)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for in_file, in_memory in module.adapter_state_dict_load_map(model.active_adapter).items():
                if f"{name}.{in_file}" in named:
                    named[f"{name}.{in_memory}"] = named.pop(f"{name}.{in_file}")
    return named


@contextmanager
def without_shape_warnings() -> Iterator[None]:
    """Keep PEFT from taking the bias of a LoRA, which is a vector, for a matrix that lost its shape."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape: .*lora_B\.bias")
        yield


def kept_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by the names in its file: the active adapter's tensors, or all where there is none."""
    if isinstance(model, PeftModel):
        name = model.active_adapter
        with without_shape_warnings():
            return dict(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    # A tied head is one tensor, and is saved once.
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def whole_tensors(model: Any) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds, whole, whatever split it. Every process must call it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    split = any(hasattr(x, "ds_id") or hasattr(x, "full_tensor") for x in trained)
    with gathered(trained):
        kept = kept_tensors(model)
        return {name: whole(tensor).detach().cpu().clone() for name, tensor in kept.items()} if split else kept


def save_kept(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write what `kept_tensors` names into `folder`: PEFT's two files, or a base that `from_pretrained` loads."""
    if isinstance(model, PeftModel):
        save_peft(model, folder, state_dict)
    else:
        with no_progress_bars():
            model.save_pretrained(str(folder), state_dict=state_dict)


def loraplus_optimizer(model: nn.Module, args: AdapterTrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that `args` name, with a higher learning rate for B (LoRA+, arXiv:2402.12354)."""
    # Of the model it wants one of transformers', for optimizers that look at its layers; a PeftModel has them too.
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    settings = {**settings, "loraplus_weight_decay": args.weight_decay}
    made: torch.optim.Optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=args.loraplus_lr_ratio, **settings
    )
    return made


def changes_the_base(config: PeftConfig) -> bool:
    """Whether an adapter of this configuration takes part of the base's weights into itself when it is made."""
    return str(getattr(config, "init_lora_weights", "")).startswith(("pissa", "olora"))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the plain LoRA that such an adapter is written as: twice the rank, the same scaling.

    Raises:
        ConfigurationError: it has ranks of its own by module, or a DoRA, which cannot be subtracted.
    """
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_dora"):
        raise ConfigurationError(
            f"An adapter that begins by {config['init_lora_weights']} cannot be written for the untouched base when it has "
            "DoRA or ranks by module. Leave one of the two out."
        )
    # alpha / r, or alpha / sqrt(r) for rsLoRA.
    alpha = config["lora_alpha"] * (2**0.5 if config.get("use_rslora") else 2)
    return {**config, "lora_alpha": alpha, "r": 2 * config["r"], "init_lora_weights": True}


def write_plain(folder: Path, initial: Mapping[str, Tensor]) -> None:
    """Rewrite the adapter in `folder`, which began as `initial` (names as in the file), for the untouched base.

    Raises:
        ConfigurationError: it has ranks of its own by module, or a DoRA, which cannot be subtracted.
    """
    config = plain_config(json.loads((folder / CONFIG_FILE).read_bytes()))
    written: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        if not HALF_OF_A_PAIR.search(name):
            written[name] = tensor
            continue
        before = initial[name].to(tensor)
        in_a = ".lora_A." in name
        written[name] = torch.cat([tensor, before if in_a else -before], dim=0 if in_a else 1).contiguous()
    save_file(written, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
