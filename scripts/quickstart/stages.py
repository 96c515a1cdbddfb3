"""The stages of the quickstart. Each takes what it needs and returns a result that JSON can hold."""

import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.evaluation import compare_with_base
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.runs.state import note_added
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.tasks import TASKS, Task
from adapterhub_lite.training.recipe import train_adapter
from adapterhub_lite.training.settings import TrainingRecipe

Say = Callable[[str], None]
ANSWER_TOKENS = 64
SWITCHES = 100


@dataclass(frozen=True)
class QuickstartSettings:
    """How much the quickstart does. `steps` maps a task to its optimizer steps."""

    base: str = "smollm2-135m"
    steps: tuple[tuple[str, int], ...] = (("sql", 30), ("event", 120))
    batch_size: int = 8
    learning_rate: float = 3e-3
    rank: int = 8
    held_out: int = 50
    seed: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order in which they are trained."""
        return tuple(name for name, _ in self.steps)


def train_stage(settings: QuickstartSettings, task: Task, base: ResolvedBase, folder: Path) -> dict[str, Any]:
    """Train one task's adapter into `folder`; an interrupted run continues from its last checkpoint."""
    steps = dict(settings.steps)[task.name]
    recipe = TrainingRecipe(
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        rank=settings.rank,
        seed=settings.seed,
    )
    rows = task.rows(steps * settings.batch_size, seed=settings.seed)
    outcome = train_adapter(base, rows, folder, recipe, data_id=f"adapterhub-lite/tasks/{task.name}")
    return {
        "adapter": str(outcome.folder),
        "train_seconds": round(outcome.record.wall_seconds, 2),
        "peak_bytes": outcome.record.memory.measured_peak_bytes,
        "steps": outcome.record.steps,
    }


def evaluate_stage(
    settings: QuickstartSettings, base: ResolvedBase, trained: dict[str, dict[str, Any]], say: Say
) -> dict[str, dict[str, float]]:
    """Exact match of generated text on held-out rows, of base and adapter, for every task."""
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        registry = AdapterRegistry(scratch)
        for name, result in trained.items():
            registry.add(Path(result["adapter"]), name, base=base)
        with InferenceEngine.from_base(str(base.folder), registry=registry) as engine:
            for name in trained:
                rows = TASKS[name].rows(settings.held_out, seed=settings.seed, split="held-out")
                scores[name] = compare_with_base(engine, name, rows, ANSWER_TOKENS)
                base_share, adapter_share = scores[name]["base_exact_match"], scores[name]["adapter_exact_match"]
                say(f"{name}: base {base_share:.2f}, adapter {adapter_share:.2f}")
    return scores


def share_stage(
    settings: QuickstartSettings,
    base: ResolvedBase,
    registry: AdapterRegistry,
    trained: dict[str, dict[str, Any]],
    scores: dict[str, dict[str, float]],
    hub_data: Path,
) -> dict[str, Any]:
    """Add both adapters to the registry, push them to an embedded hub, pull them elsewhere, compare every file."""
    disable_progress_bars()
    versions: dict[str, int] = {}
    digests: dict[str, str] = {}
    with HubServer(hub_data) as hub, tempfile.TemporaryDirectory() as elsewhere:
        second = AdapterRegistry(elsewhere)
        for name, result in trained.items():
            rows = TASKS[name].rows(settings.held_out, seed=settings.seed, split="held-out")
            manifest = registry.add(
                Path(result["adapter"]),
                name,
                base=base,
                evaluation=[
                    {
                        "metric": "exact_match",
                        "base_value": scores[name]["base_exact_match"],
                        "adapter_value": scores[name]["adapter_exact_match"],
                        "data": f"adapterhub-lite/tasks/{name}, {len(rows)} held-out rows",
                    }
                ],
                task=TASKS[name].description,
                examples=[row["messages"][0]["content"] for row in rows[:4]],
            )
            reference = f"{name}:{manifest.version}"
            note_added(Path(result["adapter"]), reference)
            receipt = registry.push(reference, f"quickstart/{name}-lora", endpoint=hub.url)
            pulled = second.pull(f"quickstart/{name}-lora", revision=receipt.tag, endpoint=hub.url)
            compare_copies(registry, manifest, second, pulled.manifest)
            versions[name], digests[name] = manifest.version, manifest.digest
    return {"versions": versions, "digests": digests, "hub_round_trip": "identical"}


def compare_copies(
    first: AdapterRegistry, ours: AdapterManifest, second: AdapterRegistry, theirs: AdapterManifest
) -> None:
    """Hash every file of both copies from disk, whatever the manifests say.

    Raises:
        AdapterHubError: a file differs or is missing.
    """
    if set(ours.files) != set(theirs.files):
        raise AdapterHubError(f"{ours.name}: the pulled files are not the pushed ones.")
    for name in ours.files:
        digests = []
        for registry, manifest in ((second, theirs), (first, ours)):
            with registry.file(manifest, name).open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        there, here = digests
        if there != here:
            raise AdapterHubError(f"{ours.name}: {name} came back with sha256 {there}, pushed was {here}.")


def serve_stage(settings: QuickstartSettings, base: ResolvedBase, registry: AdapterRegistry) -> dict[str, Any]:
    """One base, both adapters: a mixed batch against solo answers, then switching back and forth."""
    adapters: list[str | None] = [None, *settings.tasks]
    questions = [
        row["messages"][:-1]
        for name in settings.tasks
        for row in TASKS[name].rows(2, seed=settings.seed, split="held-out")
    ]
    requests = [
        GenerationRequest(messages=messages, adapter=adapter, max_new_tokens=24)
        for messages in questions
        for adapter in adapters
    ]
    # In fp32, where equality is guaranteed: in bf16 a near tie may be decided either way by the shape of the batch.
    with InferenceEngine.from_base(str(base.folder), registry=registry, dtype=torch.float32) as engine:
        mixed = engine.generate_many(requests)
        solo = [engine.generate(request) for request in requests]
        switches = [
            engine.generate(
                GenerationRequest(messages=questions[0], adapter=adapters[index % len(adapters)], max_new_tokens=1)
            ).timings.switch_seconds
            for index in range(SWITCHES)
        ]
    milliseconds = sorted(1000 * seconds for seconds in switches)
    return {
        "mixed_batch_equals_solo": [r.token_ids for r in mixed] == [r.token_ids for r in solo],
        "mixed_batch_rows": len(requests),
        "switch_ms_median": round(statistics.median(milliseconds), 4),
        "switch_ms_p99": round(milliseconds[int(0.99 * len(milliseconds))], 4),
    }


def settings_of(settings: QuickstartSettings, base: ResolvedBase) -> dict[str, Any]:
    """What the results of the stages depend on."""
    return {**asdict(settings), "base_fingerprint": base.fingerprint}


def start_over(home: Path) -> None:
    """Remove what earlier quickstart runs left, except the registry's versions, which are never deleted."""
    shutil.rmtree(home / "quickstart", ignore_errors=True)
    for run in (home / "runs").glob("quickstart-*"):
        shutil.rmtree(run, ignore_errors=True)


class Stopwatch:
    """Seconds since its creation, for the last line of the report."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of wall time so far."""
        return time.perf_counter() - self._start
