"""Training: a base model and rows in, an adapter folder with its record out. Knows nothing of serving."""

from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.exact_match import ExactMatch, evaluate_exact_match
from adapterhub_lite.training.generation import GeneratedMetrics, generate_answers
from adapterhub_lite.training.trainer import AdapterTrainer

__all__ = [
    "AdapterTrainer",
    "AdapterTrainingArguments",
    "ExactMatch",
    "GeneratedMetrics",
    "evaluate_exact_match",
    "generate_answers",
    "load_rows",
]
