"""Rows of tokens that a run's adapter brings along: the base grows by them in memory, and the adapter trains them.

What is kept of them are these rows alone (PEFT's `trainable_token_indices`), of the embedding and of a head that is a matrix
of its own; the base on disk stays as it is. They begin as transformers' `resize_token_embeddings` draws them, from the mean
and the covariance of the others.
"""

import copy
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import set_seed

from adapterhub_lite.adapter_format.added_tokens import AddedTokens
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory import MEMORY_PRESETS, read_config
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.vocabulary import WAY_OUT, rows_with
from adapterhub_lite.training.distributed.sharded import splits_weights


def check_can_bring(added: AddedTokens | None, args: AdapterTrainingArguments) -> None:
    """Refuse a run whose new tokens would have no adapter to go with, or whose weights are split.

    Raises:
        ConfigurationError: says what to do instead.
    """
    if added is None:
        return
    preset = MEMORY_PRESETS.get(args.memory_preset)
    if preset is not None and preset.trains != "lora":
        raise ConfigurationError(
            f"New tokens go with an adapter, and memory_preset={preset.name!r} trains the base itself. {WAY_OUT}"
        )
    if splits_weights(args) or (preset is not None and preset.strategy in ("zero3", "fsdp")):
        raise ConfigurationError(
            "New tokens are not trained where an engine splits the weights (ZeRO-3, FSDP): take ddp, zero1 or zero2."
        )


def grow(model: Any, added: AddedTokens | None, seed: int) -> None:
    """Give `model` the rows of these tokens, where it has them not; drawn with `seed`.

    Raises:
        ConfigurationError: its embedding cannot be resized.
    """
    if added is None:
        return
    rows = len(model.get_input_embeddings().weight)
    if rows_with(added, rows) == rows:
        return
    set_seed(seed)
    try:
        model.resize_token_embeddings(rows_with(added, rows))
    except (NotImplementedError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigurationError(f"{type(model).__name__} takes no new tokens: {error}") from error


def training_rows(
    config: PeftConfig, added: AddedTokens | None, model: nn.Module, args: AdapterTrainingArguments, *, own: bool
) -> PeftConfig:
    """A configuration that trains the rows of these tokens too.

    One of the user's (not our `own`) says so itself, unless the tokens were named in `added_tokens`: their numbers are
    known only here.
    """
    if added is None or not isinstance(config, LoraConfig) or config.trainable_token_indices:
        return config
    if not own and not args.added_tokens:
        return config
    ends = _ends(model)
    if {name.rpartition(".")[2] for name in ends} <= set(config.modules_to_save or ()):
        return config
    changed, ids = copy.copy(config), [token.id for token in added.tokens]
    changed.trainable_token_indices = ids if len(ends) == 1 else {name: list(ids) for name in ends}
    return changed


def _ends(model: Any) -> list[str]:
    """The modules of a model that have a row per token: its embedding, and its head where that is another matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [name for module in ends for name, one in model.named_modules() if one is module]


def grown_config(base: Any, added: AddedTokens) -> Any:
    """The configuration of a base (as `estimate_memory` takes it) with the rows of these tokens; nothing is loaded."""
    grown = copy.deepcopy(read_config(base))
    text = grown.get_text_config()
    text.vocab_size = rows_with(added, text.vocab_size)
    return grown
