"""Base beside adapter on the same rows: joins the exact match of `training` with the engine of `serving`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.tasks import Row, get_task

if TYPE_CHECKING:
    from adapterhub_lite.serving import InferenceEngine


def evaluation_rows(data: str | None, task: str | None, limit: int) -> list[dict[str, Any]]:
    """Return at most `limit` rows: of a data set, or the held-out ones of an example task.

    Raises:
        ConfigurationError: both or neither were given.
    """
    from adapterhub_lite.training import load_rows

    if (data is None) == (task is None):
        raise ConfigurationError("Give either --data (a JSONL file or a Hub id) or --task (an example task).")
    if task is not None:
        return [dict(row) for row in get_task(task).rows(limit, split="held-out")]
    rows = load_rows(data)
    return [dict(row) for row in rows.select(range(min(limit, len(rows))))]


def compare_with_base(
    engine: "InferenceEngine", reference: str, rows: Sequence[Row | dict[str, Any]], max_new_tokens: int
) -> dict[str, float]:
    """Exact match of greedy answers, as shares of `rows`: `base_exact_match` and `adapter_exact_match`."""
    return {
        "base_exact_match": _share(engine, None, rows, max_new_tokens),
        "adapter_exact_match": _share(engine, reference, rows, max_new_tokens),
    }


def _share(
    engine: "InferenceEngine", adapter: str | None, rows: Sequence[Row | dict[str, Any]], max_new_tokens: int
) -> float:
    from adapterhub_lite.serving import GenerationRequest
    from adapterhub_lite.training import evaluate_exact_match

    def generate(prompts: list[list[dict[str, str]]]) -> list[str]:
        requests = [
            GenerationRequest(messages=messages, adapter=adapter, max_new_tokens=max_new_tokens) for messages in prompts
        ]
        return [result.text for result in engine.generate_many(requests)]

    match = evaluate_exact_match(generate, rows)
    return match.correct / match.total
