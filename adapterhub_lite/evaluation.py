"""Base and adapter compared on the same rows: by their answers, by their loss, and on whole benchmarks.

This combines rooms that know nothing of each other: the rows of `training`, the engine of `serving`, the versions of
`registry`.
"""

import importlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.manifest import EvaluationRecord
from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.bases.chat.template import template_digest
from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.installation import missing_extra
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.adapters.sources import RegistrySource
from adapterhub_lite.tasks import Row, get_task
from adapterhub_lite.training.settings import RowSettings

Rows = Sequence[Row | dict[str, Any]]
Metric = Callable[[str, str], float]
LOSSES = ("loss", "perplexity")
MOST_TOKENS = 2048
ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class Comparison:
    """One metric, of the bare base and of the adapter."""

    metric: str
    base: float
    adapter: float


@dataclass(frozen=True)
class AnsweredRow:
    """One row with the answer it wants and those of base and adapter."""

    prompt: str
    wanted: str
    base: str
    adapter: str


def evaluation_rows(
    data: str | None, task: str | None, limit: int, settings: RowSettings | None = None
) -> list[dict[str, Any]]:
    """Return at most `limit` rows: from a data set, read as training reads it, or the held-out rows of an example task.

    Raises:
        ConfigurationError: both or neither were given.
        DataError: the data cannot be used.
    """
    from adapterhub_lite.training.recipe import read_rows

    if (data is None) == (task is None):
        raise ConfigurationError("Give either --data (a JSONL file or a Hub id) or --task (an example task).")
    if task is not None:
        return [dict(row) for row in get_task(task).rows(limit, split="held-out")]
    rows = read_rows(str(data), settings or RowSettings())
    return [dict(row) for row in rows.select(range(min(limit, len(rows))))]


def find_metric(name: str) -> Metric | None:
    """Return the function that scores one answer, for a metric written `module:function`; None for a loss.

    It is called with (expected, answer), and its mean over the rows is the metric. The module is searched for in the
    working folder first.

    Raises:
        ConfigurationError: no such metric, module or function.
    """
    if name in LOSSES:
        return None
    if name == "exact_match":
        return lambda wanted, found: float(wanted.strip() == found.strip())
    if name == "valid_json":
        return lambda wanted, found: float(_is_json(found))
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigurationError(
            f"There is no metric {name!r}. Known: exact_match, valid_json, loss, perplexity, or a function of yours as module:function."
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"The metric {name!r} could not be loaded: {error}.") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise ConfigurationError(f"The metric {name!r} is not a function of (expected, answer).")
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def measure(
    registry: AdapterRegistry,
    manifest: AdapterManifest,
    base: str,
    rows: Rows,
    metrics: Sequence[str],
    *,
    max_new_tokens: int,
    home: str | None = None,
    settings: RowSettings | None = None,
    answered_rows: list[AnsweredRow] | None = None,
    tell: Callable[[int], None] | None = None,
) -> list[Comparison]:
    """Compare base and adapter on `rows` by each of `metrics`, loading the base as often as they need it.

    `answered_rows` takes every row with its answers, where a metric asked for answers; `tell` hears how many there are,
    of both together. Of `settings` the arguments of the chat template are taken, and the keys that may be lost.

    Raises:
        ConfigurationError: no such metric, or a user's function did not return a finite number.
    """
    answered, measured = [name for name in metrics if name not in LOSSES], list[Comparison]()
    if answered:
        with InferenceEngine.from_base(base, registry=registry, home=home) as engine:
            asked = settings.template_arguments() if settings is not None else None
            measured += compare_answers(
                engine, manifest.reference, rows, answered, max_new_tokens, asked, answered_rows, tell
            )
    if set(metrics) & set(LOSSES):
        found = compare_losses(registry, manifest, resolve_base(base, home=home), rows, settings)
        measured += [one for one in found if one.metric in metrics]
    return measured


def record_comparisons(
    registry: AdapterRegistry, manifest: AdapterManifest, measured: Sequence[tuple[Comparison, str]]
) -> None:
    """Store comparisons in the registry, each with a name of the data it was measured on."""
    records = [
        EvaluationRecord(metric=one.metric, adapter_value=one.adapter, base_value=one.base, data=data[:200])
        for one, data in measured
    ]
    registry.record_evaluation(manifest.reference, records)


def compare_with_base(engine: InferenceEngine, reference: str, rows: Rows, max_new_tokens: int) -> dict[str, float]:
    """Exact match of greedy answers, as shares of `rows`: `base_exact_match` and `adapter_exact_match`."""
    (score,) = compare_answers(engine, reference, rows, ("exact_match",), max_new_tokens)
    return {"base_exact_match": score.base, "adapter_exact_match": score.adapter}


def compare_answers(
    engine: InferenceEngine,
    reference: str,
    rows: Rows,
    metrics: Sequence[str],
    max_new_tokens: int,
    arguments: Mapping[str, Any] | None = None,
    answered_rows: list[AnsweredRow] | None = None,
    tell: Callable[[int], None] | None = None,
) -> list[Comparison]:
    """Score the greedy answers of both by each of `metrics`, averaged over `rows`.

    `arguments` go to the chat template with every row; `answered_rows` and `tell` are those of `measure`.

    Raises:
        ConfigurationError: no such metric, or a user's function did not return a finite number.
    """
    functions = {name: found for name in metrics if (found := find_metric(name)) is not None}
    told = (tell, (lambda done: tell(len(rows) + done)) if tell else None)
    base, adapter = (
        greedy_answers(engine, model, rows, max_new_tokens, arguments, hear)
        for model, hear in zip((None, reference), told, strict=True)
    )
    if answered_rows is not None:
        for row, (wanted, of_base), (_, of_adapter) in zip(rows, base, adapter, strict=True):
            answered_rows.append(AnsweredRow(question_text(row), wanted, of_base, of_adapter))
    return [Comparison(name, _mean(name, of, base), _mean(name, of, adapter)) for name, of in functions.items()]


def compare_losses(
    registry: AdapterRegistry,
    manifest: AdapterManifest,
    base: ResolvedBase,
    rows: Rows,
    settings: RowSettings | None = None,
) -> list[Comparison]:
    """`loss` (nats per token, over the tokens that training learns from) and `perplexity`, its exponential.

    Chats are laid out by the adapter's own template and end with its own tokens, where it has some.

    Rows beyond 2,048 tokens are truncated. One row is computed at a time, so only the logits of one row are in memory.
    """
    from adapterhub_lite.bases.encoding import end_tokens
    from adapterhub_lite.training.data.preparation import Preparation
    from adapterhub_lite.training.data.reading.shapes import Columns
    from adapterhub_lite.training.data.tokenization import Limits

    chosen = settings or RowSettings()
    files = RegistrySource(registry).locate(manifest.reference)
    with _both_models(registry, manifest, base) as (model, tokenizer):
        preparation = Preparation(
            tokenizer,
            Limits(MOST_TOKENS, "truncate"),
            files.asked.end_tokens or end_tokens(tokenizer, base.folder),
            chosen.template_arguments(),
            Columns(ignore=chosen.ignored()),
            bounded_template=FoundAdapters((files,)).template(template_digest(tokenizer)),
        )
        table = preparation.rows([dict(row) for row in rows]).table
        with model.disable_adapter():
            plain = _mean_loss(model, table)
        adapted = _mean_loss(model, table)
    return [Comparison("loss", plain, adapted), Comparison("perplexity", math.exp(plain), math.exp(adapted))]


def compare_on_harness(
    registry: AdapterRegistry,
    manifest: AdapterManifest,
    base: ResolvedBase,
    tasks: Sequence[str],
    *,
    limit: int,
    folder: Path | None = None,
) -> list[Comparison]:
    """Run tasks of lm-evaluation-harness, `limit` documents each; `folder` may contain the user's own task files.

    Raises:
        ConfigurationError: it is not installed, or has no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("--harness", "harness") from error
    known = TaskManager(include_path=str(folder) if folder else None)
    missing = [task for task in tasks if task not in known.all_tasks]
    if missing:
        raise ConfigurationError(f"lm-evaluation-harness has no task {', '.join(missing)}.")
    scores: list[dict[str, float]] = []
    with _both_models(registry, manifest, base) as (model, tokenizer):
        for only_base in (True, False):
            with model.disable_adapter() if only_base else nullcontext():
                judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
                found = lm_eval.simple_evaluate(
                    model=judged, tasks=list(tasks), limit=limit, task_manager=known, bootstrap_iters=0
                )
            # Names come as `acc,none`; standard errors are left out.
            scores.append(
                {
                    f"{task}/{name.partition(',')[0]}": float(value)
                    for task, measured in found["results"].items()
                    for name, value in measured.items()
                    if isinstance(value, int | float) and "," in name and "stderr" not in name
                }
            )
    return [Comparison(name, scores[0][name], value) for name, value in scores[1].items()]


def greedy_answers(
    engine: InferenceEngine,
    adapter: str | None,
    rows: Rows,
    tokens: int,
    arguments: Mapping[str, Any] | None = None,
    tell: Callable[[int], None] | None = None,
) -> list[tuple[str, str]]:
    """(expected, answer) for each row, asked as training learns it: a `prompt` verbatim, turns by the chat template.

    What goes along with a chat does so here too: `tools`, `documents`, and the template's arguments, of the row and of all.

    Raises:
        DataError: there are no rows.
    """
    from adapterhub_lite.training.evaluation import question_of

    requests, wanted = [], []
    for row in rows:
        if isinstance(row.get("prompt"), str):
            asked: dict[str, Any] = {"prompt": row["prompt"]}
            answer = str(row["completion"])
        else:
            turns, answer = question_of(row)
            kwargs: Any = row.get("chat_template_kwargs")
            of_row = {**(arguments or {}), **(kwargs or {})}
            of_row |= {"documents": row["documents"]} if row.get("documents") else {}
            asked = {"messages": turns, "tools": row.get("tools") or (), "chat_template_kwargs": of_row}
        requests.append(GenerationRequest(**asked, adapter=adapter, max_new_tokens=tokens))
        wanted.append(answer)
    if not requests:
        raise DataError("There are no rows to evaluate on; at least one is needed.")
    found: list[str] = []
    for start in range(0, len(requests), ROWS_AT_A_TIME):
        found += [result.text for result in engine.generate_many(requests[start : start + ROWS_AT_A_TIME])]
        if tell is not None:
            tell(len(found))
    return list(zip(wanted, found, strict=True))


def question_text(row: Row | Mapping[str, Any]) -> str:
    """What a row asks, for people: its raw prompt, or the last turn before the answer."""
    from adapterhub_lite.training.evaluation import question_of

    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    return str(question_of(row)[0][-1].get("content"))


def _mean(name: str, metric: Metric, pairs: list[tuple[str, str]]) -> float:
    try:
        mean = sum(float(metric(wanted, found)) for wanted, found in pairs) / len(pairs)
    except Exception as error:  # a user's function may raise anything
        raise ConfigurationError(f"The metric {name!r} failed: {type(error).__name__}: {error}.") from error
    if not math.isfinite(mean):
        raise ConfigurationError(f"The metric {name!r} returned {mean}; expected finite numbers.")
    return mean


@contextmanager
def _both_models(
    registry: AdapterRegistry, manifest: AdapterManifest, base: ResolvedBase
) -> "Iterator[tuple[Any, Any]]":
    """The base with the adapter on it, by PEFT, which `disable_adapter()` takes off; and the tokenizer."""
    from peft import PeftModel

    from adapterhub_lite.bases import load_base_model, load_tokenizer

    with tempfile.TemporaryDirectory() as aside:
        folder = registry.export(manifest.reference, Path(aside) / "adapter")
        model = PeftModel.from_pretrained(load_base_model(base.folder), folder)
        yield model.eval(), load_tokenizer(base.folder)


def _mean_loss(model: Any, table: Any) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in table:
            ids, labels = (torch.as_tensor(row[key], device=model.device) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
            total += float(cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100))
            tokens += int((labels[1:] != -100).sum())
    return total / max(tokens, 1)
