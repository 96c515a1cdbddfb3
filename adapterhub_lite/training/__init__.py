"""Training: a base model and rows in, an adapter folder with its record out. Knows nothing of serving.

The public names are loaded on first use, so that a command line that reads `training.settings` imports no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "AdapterTrainer": "trainer",
    "AdapterTrainingArguments": "arguments",
    "ExactMatch": "evaluation",
    "GeneratedMetrics": "evaluation",
    "TrainingRecipe": "settings",
    "evaluate_exact_match": "evaluation",
    "generate_answers": "evaluation",
    "load_rows": "data.rows",
    "per_row": "run.step_loss",
    "train_adapter": "recipe",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list of literals, only sorted


# The type is that of whichever name is asked for.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapterhub_lite.training' has no attribute {name!r}")
    value = getattr(import_module(f"adapterhub_lite.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
