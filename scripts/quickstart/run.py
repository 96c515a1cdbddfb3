"""The quickstart: runs the stages, reports, opens the app."""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.tasks import TASKS
from scripts.quickstart.stages import (
    QuickstartSettings,
    Stopwatch,
    evaluate_stage,
    serve_stage,
    settings_of,
    share_stage,
    start_over,
    train_stage,
)
from scripts.quickstart.state import QuickstartState

console = Console(stderr=True)


def run_quickstart(home: Path, settings: QuickstartSettings, *, fresh: bool = False) -> dict[str, Any]:
    """Run every stage up to the app and return the report that `--headless` prints as its last line."""
    watch = Stopwatch()
    if fresh:
        start_over(home)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(f"Home: {home}")
    base = resolve_base(settings.base, home=home, progress=lambda step: say(f"base: {step}"))
    state = QuickstartState(home / "quickstart" / "state.json", settings_of(settings, base))
    registry = AdapterRegistry(home)
    trained = {}
    for name in settings.tasks:
        work = partial(train_stage, settings, TASKS[name], base, home / "runs" / f"quickstart-{name}")
        trained[name] = state.run(f"train {name}", work, say)
    scores = state.run("evaluate", lambda: evaluate_stage(settings, base, trained, say), say)
    shared = state.run(
        "share",
        lambda: share_stage(settings, base, registry, trained, scores, home / "quickstart" / "hub"),
        say,
    )
    for name, version in shared["versions"].items():
        registry.set_alias(name, "prod", version=version)
    served = state.run("serve", lambda: serve_stage(settings, base, registry), say)
    return {
        "tasks": {
            name: {**scores[name], **{key: value for key, value in trained[name].items() if key != "adapter"}}
            for name in settings.tasks
        },
        "hub_round_trip": shared["hub_round_trip"],
        "switch_ms_median": served["switch_ms_median"],
        "switch_ms_p99": served["switch_ms_p99"],
        "mixed_batch_equals_solo": served["mixed_batch_equals_solo"],
        "seconds": round(watch.seconds(), 1),
    }


def print_report(report: dict[str, Any]) -> None:
    """Draw the table: base against adapter, seconds, peak memory, switch time."""
    table = Table(title="Exact match on held-out questions", title_justify="left")
    for column in ("task", "base", "adapter", "steps", "train s", "peak MB"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, row in report["tasks"].items():
        table.add_row(
            name,
            f"{row['base_exact_match']:.2f}",
            f"{row['adapter_exact_match']:.2f}",
            str(row["steps"]),
            f"{row['train_seconds']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    out = Console()
    out.print(table)
    out.print(
        f"Hub round trip: {report['hub_round_trip']}. Mixed batch equals solo: {report['mixed_batch_equals_solo']}. "
        f"Switch: {report['switch_ms_median']:.3f} ms median, {report['switch_ms_p99']:.3f} ms p99. "
        f"{report['seconds']:.0f} s in all.",
        highlight=False,
    )


def open_app(base: str, home: Path) -> None:
    """Serve the app on one resident base with every adapter in the registry, until it is interrupted."""
    from adapterhub_app import launch
    from adapterhub_lite.serving import InferenceEngine

    registry = AdapterRegistry(home)
    with InferenceEngine.from_base(base, registry=registry, home=home) as engine:
        launch(engine, registry, base_name=Path(base).name, base=resolve_base(base, home=home))


def main() -> None:
    """Parse the flags, run, and open the app unless `--headless` was given."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__)
    parser.add_argument("--headless", action="store_true", help="stop before the app; the last line is one JSON object")
    parser.add_argument("--fresh", action="store_true", help="start over instead of reusing what is there")
    usual = QuickstartSettings()
    parser.add_argument("--base", default=usual.base, help="base model: an embedded name, a folder or a Hub id")
    parser.add_argument(
        "--held-out", type=int, default=usual.held_out, help="number of questions per task that are held out"
    )
    for task, steps in usual.steps:
        parser.add_argument(f"--{task}-steps", type=int, default=steps, help=f"optimizer steps of the {task} task")
    options = parser.parse_args()
    settings = replace(
        usual,
        base=options.base,
        held_out=options.held_out,
        steps=tuple((task, getattr(options, f"{task}_steps")) for task in usual.tasks),
    )
    home = adapterhub_home()
    try:
        report = run_quickstart(home, settings, fresh=options.fresh)
        print_report(report)
        if options.headless:
            print(json.dumps(report))
            return
        open_app(settings.base, home)
    except AdapterHubError as error:
        console.print(f"Error: {error}", style="bold red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command again to continue from here.")
        sys.exit(130)
