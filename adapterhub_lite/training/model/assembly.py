"""What a trainer is made of, put together before the `Trainer` is: base, tokenizer, adapter, and ways to go fast."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses import LossChoice, LossOptions, choose_loss
from adapterhub_lite.memory import MemoryPreset
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.distributed.sharded import (
    built_whole,
    engine_of,
    join_processes,
    part_at_exit,
    splits_weights,
)
from adapterhub_lite.training.model.adapters import OpenedBase, changes_the_base, kept_tensors, load_for, with_adapter
from adapterhub_lite.training.model.before_training import check_before_training
from adapterhub_lite.training.model.fast_lora import install_fast_lora, remove_fast_lora
from adapterhub_lite.training.model.lean_attention import install_lean_attention, remove_lean_attention
from adapterhub_lite.training.model.lean_modules import install_lean_modules, remove_lean_modules
from adapterhub_lite.training.model.segments import PackingChoice, choose_packing


class HiddenStates:
    """Runs a causal language model and returns the hidden states (batch, seq, D) after its final norm.

    Raises:
        ConfigurationError: the model has no output head, or no decoder of its own to listen to.
    """

    def __init__(self, model: Any) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(inner.config, "is_encoder_decoder", False):
            raise ConfigurationError(
                f"{type(inner).__name__} reads by an encoder, and causal language models are what is trained here. Use "
                "transformers' own Trainer."
            )
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        if decoder is inner:
            # Llama 4 names a prefix that its causal model does not have.
            decoder = getattr(inner, "model", None)
        if head is None or decoder is None:
            raise ConfigurationError(
                f"{type(inner).__name__} has no output head over a decoder. Load the base with AutoModelForCausalLM."
            )
        takes_positions = "logits_to_keep" in inspect.signature(inner.forward).parameters
        # No position at all: with one, a batch's slice makes matmul copy the whole head once a row.
        self._short = {"logits_to_keep": torch.empty(0, dtype=torch.long)} if takes_positions else {}
        self._seen: Tensor | None = None
        self._hook = decoder.register_forward_hook(self._listen)

    def close(self) -> None:
        """Listen no more."""
        self._hook.remove()

    def _listen(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen = output[0]

    def of(self, model: nn.Module, inputs: dict[str, Any], *, logits: bool = False) -> tuple[Tensor, Any]:
        """Run `model`, however it is wrapped, on `inputs`; return (hidden states, the model's own output).

        The output's logits are empty, where the model can leave them out and they are not asked for."""
        output = model(**({} if logits else self._short), **inputs)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen, output


@dataclass(frozen=True)
class Assembly:
    """A model with its adapter, ready to train, and what was decided about it.

    `router_weight` is that of the router loss of a mixture of experts, 0 without one.
    `initial` is the adapter as it began, kept only where its beginning changed the base.
    """

    model: Any
    base: ResolvedBase | None
    tokenizer: PreTrainedTokenizerBase
    hidden_states: HiddenStates
    packing: PackingChoice
    loss: LossChoice
    fast_layers: int
    lean_modules: int
    lean_attentions: int
    router_weight: float = 0.0
    initial: dict[str, Tensor] | None = None

    def record(self) -> dict[str, str]:
        """What was decided, for the training record."""
        return {
            **self.loss.record(),
            "batches": self.packing.reason,
            "lora": f"{self.fast_layers} layers take the fused step",
            "blocks": f"{self.lean_modules} norms and gated MLPs keep less for the backward pass",
            "attention step": f"{self.lean_attentions} attentions take the lean step for short rows",
        }


def assemble(
    opened: OpenedBase,
    args: AdapterTrainingArguments,
    peft_config: PeftConfig | None,
    preset: MemoryPreset,
    attention: str,
    rows_read_by: str | None = None,
) -> Assembly:
    """Load the base as `preset` says, put the adapter on it, and decide how its steps are made.

    `attention` is the name of the attention implementation that the base is loaded with; `rows_read_by` says what of the
    user's own expects a batch of one row per sequence.

    Raises:
        ConfigurationError: model, tokenizer and arguments do not fit together.
        UnknownNameError: there is no such loss implementation.
    """
    join_processes(args)
    part_at_exit()
    return adapted(load_for(opened, preset, attention, args.seed), opened, args, peft_config, preset, rows_read_by)


def adapted(
    model: Any,
    opened: OpenedBase,
    args: AdapterTrainingArguments,
    peft_config: PeftConfig | None,
    preset: MemoryPreset,
    rows_read_by: str | None = None,
) -> Assembly:
    """Put the adapter on a loaded base, and decide how its steps are made; see `assemble`."""
    hidden_states = HiddenStates(model)
    if preset.trains == "lora":
        model = with_adapter(model, args, peft_config, opened)
    initial = None
    if isinstance(model, PeftModel):
        with built_whole(args):
            check_before_training(model, opened.base, whole=not splits_weights(args))
    if isinstance(model, PeftModel) and changes_the_base(model.active_peft_config):
        initial = {name: tensor.detach().clone() for name, tensor in kept_tensors(model).items()}
    loss = choose_loss(
        model,
        tokens=args.per_device_train_batch_size * args.longest_row,
        options=LossOptions(label_smoothing=args.label_smoothing_factor, chunk_tokens=args.loss_chunk_tokens),
        prefer=args.loss_backend,
        partitioned=engine_of(args) == "zero3",
    )
    router = router_weight_of(model, args)
    packing = choose_packing(model, args, rows_read_by or ("the router loss reads the mask" if router else None))
    # They read weights outside the modules' own forward, where an engine that splits weights leaves them empty.
    lean_ways = args.fast_lora and not splits_weights(args)
    fast = install_fast_lora(model) if lean_ways else 0
    lean = install_lean_modules(model) if lean_ways else 0
    attentions = install_lean_attention(model) if lean_ways and packing.packs and not args.torch_compile else 0
    parts = model, opened.base, opened.tokenizer, hidden_states, packing, loss
    return Assembly(*parts, fast, lean, attentions, router, initial)


def adapted_again(
    assembly: Assembly,
    opened: OpenedBase,
    args: AdapterTrainingArguments,
    peft_config: PeftConfig | None,
    preset: MemoryPreset,
    rows_read_by: str | None = None,
) -> Assembly:
    """A fresh adapter on the base that `assembly` has in memory, whose own adapter is taken off.

    Raises:
        ConfigurationError: what is trained is not an adapter, or its beginning changed the base.
    """
    model = assembly.model
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    # PEFT leaves what it trained whole in the base that it gives back.
    stays = getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None)
    if config is None or stays or assembly.initial is not None:
        raise ConfigurationError(
            "Only an adapter that leaves its base untouched can be made anew on it: leave out full, head-only, PiSSA, "
            "OLoRA, modules_to_save and trainable_token_indices, or give a model_init that loads the base each time."
        )
    remove_fast_lora(model)
    remove_lean_modules(model)
    remove_lean_attention(model)
    assembly.hidden_states.close()
    bare: Any = model.unload()
    if hasattr(bare, "peft_config"):
        del bare.peft_config
    return adapted(bare, opened, args, peft_config, preset, rows_read_by)


def router_weight_of(model: Any, args: AdapterTrainingArguments) -> float:
    """The weight of the router loss that `model` gives with its output; 0 where it gives none. Sets what `args` say.

    Raises:
        ConfigurationError: a weight was given to a model without such a loss, or the model does not say its own.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    name = next((one for one in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(inner, one)), None)
    if args.router_aux_loss_coef is not None:
        if name is None:
            raise ConfigurationError(
                f"{type(inner).__name__} has no router loss: leave out router_aux_loss_coef, which is for mixtures of experts."
            )
        setattr(inner, name, args.router_aux_loss_coef)
        config.output_router_logits = inner.config.output_router_logits = args.router_aux_loss_coef > 0
    if not getattr(config, "output_router_logits", False):
        return 0.0
    if name is None:
        raise ConfigurationError(
            f"{type(inner).__name__} gives a router loss and does not say its weight. Set config.output_router_logits=False."
        )
    return float(getattr(inner, name))


@contextmanager
def plain(assembly: Assembly) -> Iterator[Any]:
    """Give the model back its own classes for a while: what others will run is what is asked then."""
    remove_fast_lora(assembly.model)
    remove_lean_modules(assembly.model)
    remove_lean_attention(assembly.model)
    try:
        yield assembly.model
    finally:
        if assembly.fast_layers:
            install_fast_lora(assembly.model)
        if assembly.lean_modules:
            install_lean_modules(assembly.model)
        if assembly.lean_attentions:
            install_lean_attention(assembly.model)
