"""How fast is the registry with 10,000 versions in it? Writes results/registry.json and .png.

    python -m scripts.bench.keep.registry [--versions 10000]

Manifests carry a training record of the usual size. "first" is with an empty cache of parsed manifests, "again" with a
full one. Medians; the wanted limits are 1 ms for a resolve and 100 ms for a list.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.manifest import (
    BaseRecord,
    DataRecord,
    EvaluationRecord,
    FileRecord,
    LoraRecord,
    MemoryRecord,
    TrainingRecord,
)
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.registry.store.database import insert_version, parse_stored
from scripts.bench.report import RESULTS, write_result

NAMES = 20
START = "import time; t = time.perf_counter(); from adapterhub_lite.registry import AdapterRegistry;"
ONE_VERB = START + "AdapterRegistry({home!r}).resolve('task-3@prod'); import sys; assert 'torch' not in sys.modules"


def manifest(name: str, version: int) -> AdapterManifest:
    """A manifest of the usual size (about 3 kB), for no real files."""
    base = BaseRecord(id="HuggingFaceTB/SmolLM2-135M-Instruct", fingerprint="a" * 64)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    training = TrainingRecord(
        base=base,
        data=DataRecord(id="sql-train.jsonl", rows=5000, fingerprint="b" * 64),
        template_digest="c" * 64,
        seeds={"init": 0, "data": 1, "torch": 2},
        hyperparameters={f"setting_{i}": i / 7 for i in range(30)},
        packages={f"package-{i}": "1.2.3" for i in range(10)},
        preset="lora-bf16",
        loss_backend={"name": "chunked", "reason": "the logits would not fit"},
        memory=MemoryRecord(predicted_bytes=1 << 30, measured_peak_bytes=1 << 30),
        hardware={"cpu": "two cores", "memory_bytes": 1 << 34},
        steps=300,
        final_loss=0.3,
        wall_seconds=100.0,
    )
    return AdapterManifest(
        name=name,
        version=version,
        digest=f"sha256:{abs(hash((name, version))):064x}",
        files={"adapter_model.safetensors": FileRecord(sha256="d" * 64, size=10 << 20)},
        base=base,
        lora=LoraRecord(rank=8, alpha=16.0, scaling=2.0, target_modules=targets, modules_bound=210, modules_total=210),
        training=training,
        evaluation=(EvaluationRecord(metric="exact_match", adapter_value=version / 1000, data="sql-test"),),
        task="sql",
        tags=("bench", f"t{version % 10}"),
        created="2026-01-01T00:00:00Z",
    )


def fill(registry: AdapterRegistry, versions: int) -> None:
    """Put the rows in, in one transaction: adding is measured by itself."""
    with registry.store.write() as connection:
        for index in range(versions):
            insert_version(connection, manifest(f"task-{index % NAMES}", index // NAMES + 1), None)
    for index in range(NAMES):
        registry.set_alias(f"task-{index}", "prod", version=versions // NAMES // 2)


def median_ms(act: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> float:
    """The median of `rounds` runs, in milliseconds; `before` is run ahead of each and not counted."""
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        act()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 4)


def measure(registry: AdapterRegistry, versions: int) -> dict[str, Any]:
    """Every figure, in milliseconds."""
    clear = parse_stored.cache_clear
    digest = registry.resolve("task-3:5").digest
    forms = {"name": "task-3", "version": "task-3:5", "alias": "task-3@prod", "digest": digest}
    resolve = {
        form: {
            "first": median_ms(lambda r=reference: registry.resolve(r), 500, clear),  # type: ignore[misc]
            "again": median_ms(lambda r=reference: registry.resolve(r), 2000),  # type: ignore[misc]
        }
        for form, reference in forms.items()
    }
    assert len(registry.summaries()) == versions
    listing = {
        "lines": median_ms(registry.summaries, 15),
        "lines_of_one_name": median_ms(lambda: registry.summaries("task-3"), 15),
        "lines_by_metric": median_ms(lambda: registry.summaries(metric="exact_match>=0.25"), 15),
        "lines_by_tag": median_ms(lambda: registry.summaries(tag="t3"), 15),
        "whole_manifests_first": median_ms(registry.list, 5, clear),
        "set_alias": median_ms(
            lambda: registry.set_alias("task-3", "x", version=1 + (registry.aliases("task-3").get("x") == 1)), 50
        ),
    }
    command = [sys.executable, "-c", ONE_VERB.format(home=str(registry.home))]
    fresh = median_ms(lambda: subprocess.run(command, check=True), 7)
    empty = median_ms(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True), 7)
    return {
        "resolve_ms": resolve,
        "list_ms": listing,
        "fresh_process_resolve_ms": fresh,
        "fresh_process_empty_ms": empty,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Bars beside the wanted limits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    forms = found["resolve_ms"]
    left.bar([f"{form}\n{when}" for form in forms for when in ("first", "again")],
             [forms[form][when] for form in forms for when in ("first", "again")])  # fmt: skip
    left.axhline(1.0, color="red", label="wanted: under 1 ms")
    left.set(ylabel="milliseconds", title="resolve one reference", yscale="log")
    lists = {key: value for key, value in found["list_ms"].items() if key.startswith("lines")}
    right.barh(list(lists), list(lists.values()))
    right.axvline(100.0, color="red", label="wanted: under 100 ms")
    right.set(xlabel="milliseconds", title=f"list {found['versions']:,} versions")
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fill a registry in a scratch folder, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000)
    wanted = parser.parse_args().versions
    with tempfile.TemporaryDirectory() as home:
        registry = AdapterRegistry(home)
        fill(registry, wanted)
        found = {"versions": wanted, **measure(registry, wanted)}
    print(write_result("registry", found))
    plot(found, RESULTS / "registry.png")


if __name__ == "__main__":
    main()
