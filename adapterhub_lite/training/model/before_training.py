"""Law 15 on the trainer's side: a model with its adapter is asked, before its first step, whether it could be kept."""

import logging
from typing import Any

from peft import PeftModel

from adapterhub_lite.adapter_format.binding import problems_of_untrained
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.structure import structure_for, structure_in
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.model.adapters import HALF_OF_A_PAIR, changes_the_base, kept_tensors, plain_config

logger = logging.getLogger(__name__)


def check_before_training(model: PeftModel, base: ResolvedBase | None, *, whole: bool) -> None:
    """Refuse an adapter that could not be kept, served or merged once it is trained, by the check made then.

    `whole` is whether this process has all of each tensor; where it has not, the configuration alone is checked.

    Raises:
        ConfigurationError: with every reason.
    """
    kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    if kind != "LORA":
        logger.warning(
            f"This adapter is {kind}, not LoRA: it trains, and save_model keeps it for PEFT, but registry, server and merge "
            "take LoRA alone."
        )
        return
    config = model.active_peft_config.to_dict()
    mutated = changes_the_base(model.active_peft_config)
    if mutated:
        config = plain_config(config)
    structure = structure_in(base.folder) if base is not None else structure_for(model.config)
    problems = problems_of_untrained(config, None, structure)
    # Of what is refused by its configuration, PEFT cannot always say what it would save.
    if whole and not problems:
        shapes = {name: tuple(tensor.shape) for name, tensor in kept_tensors(model).items()}
        if mutated:
            # Written with what it began as beside it, so of twice the rank.
            shapes |= {
                n: (2 * s[0], s[1]) if ".lora_A." in n else (s[0], 2 * s[1])
                for n, s in shapes.items()
                if HALF_OF_A_PAIR.search(n)
            }
        resized: Any = model  # a model of transformers inside, which PEFT asks
        rows = None if base is None else len(resized.get_input_embeddings().weight)
        problems = problems_of_untrained(config, shapes, structure, rows)
    if problems:
        raise ConfigurationError(
            f"This adapter would be refused once it is trained, so it is not trained: {'; '.join(problems)}."
        )
