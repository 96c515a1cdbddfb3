"""What a trainer is made of, put together before the `Trainer` is: base, tokenizer, adapter, and ways to go fast."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.losses import LossChoice, LossOptions, choose_loss
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.distributed.sharded import engine_of, join_processes, part_at_exit, splits_weights
from adapterhub_lite.training.model.adapters import OpenedBase, kept_tensors, load_for, with_adapter
from adapterhub_lite.training.model.fast_lora import install_fast_lora, remove_fast_lora
from adapterhub_lite.training.model.hidden_states import HiddenStates
from adapterhub_lite.training.model.lean_modules import install_lean_modules, remove_lean_modules
from adapterhub_lite.training.model.mutated_init import changes_the_base
from adapterhub_lite.training.model.shortcuts import PackingChoice, choose_packing
from adapterhub_lite.training.run.memory_choice import MemoryChoice


@dataclass(frozen=True)
class Assembly:
    """A model with its adapter, ready to train, and what was decided about it.

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
    memory: MemoryChoice
    initial: dict[str, Tensor] | None = None

    def record(self) -> dict[str, str]:
        """What was decided, for the training record."""
        return {
            **self.loss.record(),
            **self.memory.record(),
            "batches": self.packing.reason,
            "lora": f"{self.fast_layers} layers take the fused step",
            "blocks": f"{self.lean_modules} norms and gated MLPs keep less for the backward pass",
        }


def assemble(
    opened: OpenedBase, args: AdapterTrainingArguments, peft_config: PeftConfig | None, choice: MemoryChoice
) -> Assembly:
    """Load the base as the memory preset says, put the adapter on it, and decide how its steps are made.

    Raises:
        ConfigurationError: model, tokenizer and arguments do not fit together.
        UnknownNameError: there is no such loss implementation.
    """
    join_processes(args)
    part_at_exit()
    model = load_for(opened, choice.preset, choice.attention.partition(":")[0])
    hidden_states = HiddenStates(model)
    if choice.preset.trains == "lora":
        model = with_adapter(model, args, peft_config, opened.base)
    initial = None
    if isinstance(model, PeftModel) and changes_the_base(model.active_peft_config):
        initial = {name: tensor.detach().clone() for name, tensor in kept_tensors(model).items()}
    loss = choose_loss(
        model,
        tokens=args.per_device_train_batch_size * args.max_length,
        options=LossOptions(label_smoothing=args.label_smoothing_factor, chunk_tokens=args.loss_chunk_tokens),
        prefer=args.loss_backend,
        partitioned=engine_of(args) == "zero3",
    )
    packing = choose_packing(model, args)
    # They read weights outside the modules' own forward, where an engine that splits weights leaves them empty.
    lean_ways = args.fast_lora and not splits_weights(args)
    fast = install_fast_lora(model) if lean_ways else 0
    lean = install_lean_modules(model) if lean_ways else 0
    return Assembly(model, opened.base, opened.tokenizer, hidden_states, packing, loss, fast, lean, choice, initial)


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
