"""What a trainer is made of, put together before the `Trainer` is: base, tokenizer, adapter, and ways to go fast."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases import ResolvedBase, load_tokenizer
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses import LossChoice, LossOptions, choose_loss
from adapterhub_lite.training.adapters import open_base, with_adapter
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.fast_lora import install_fast_lora, remove_fast_lora
from adapterhub_lite.training.hidden_states import HiddenStates
from adapterhub_lite.training.lean_modules import install_lean_modules, remove_lean_modules
from adapterhub_lite.training.packing import PackingChoice, choose_packing


@dataclass(frozen=True)
class Assembly:
    """A model with its adapter, ready to train, and what was decided about it."""

    model: Any
    base: ResolvedBase | None
    tokenizer: PreTrainedTokenizerBase
    hidden_states: HiddenStates
    packing: PackingChoice
    loss: LossChoice
    fast_layers: int
    lean_modules: int

    def record(self) -> dict[str, str]:
        """What was decided, for the training record."""
        return {
            **self.loss.record(),
            "batches": self.packing.reason,
            "lora": f"{self.fast_layers} layers take the fused step",
            "blocks": f"{self.lean_modules} norms and gated MLPs keep less for the backward pass",
        }


def assemble(
    model: Any,
    args: AdapterTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    base: ResolvedBase | None,
) -> Assembly:
    """Open the base, put the adapter on it, and decide how its steps are made.

    Raises:
        ConfigurationError: model, tokenizer and arguments do not fit together.
        UnknownNameError: there is no such base or loss implementation.
    """
    model, base = open_base(model, base)
    tokenizer = tokenizer or (load_tokenizer(base.folder) if base else None)
    if tokenizer is None:
        raise ConfigurationError("The trainer wants a tokenizer. Give it as processing_class.")
    hidden_states = HiddenStates(model)
    adapted = with_adapter(model, args, peft_config, base)
    loss = choose_loss(
        adapted,
        tokens=args.per_device_train_batch_size * args.max_length,
        options=LossOptions(label_smoothing=args.label_smoothing_factor, chunk_tokens=args.loss_chunk_tokens),
        prefer=args.loss_backend,
    )
    packing = choose_packing(adapted, args)
    fast = install_fast_lora(adapted) if args.fast_lora else 0
    lean = install_lean_modules(adapted) if args.fast_lora else 0
    return Assembly(adapted, base, tokenizer, hidden_states, packing, loss, fast, lean)


@contextmanager
def plain(assembly: Assembly) -> Iterator[Any]:
    """Give the model back its own classes for a while: what others will run is what is asked then."""
    remove_fast_lora(assembly.model)
    remove_lean_modules(assembly.model)
    try:
        yield assembly.model
    finally:
        if assembly.fast_layers:
            install_fast_lora(assembly.model)
        if assembly.lean_modules:
            install_lean_modules(assembly.model)
