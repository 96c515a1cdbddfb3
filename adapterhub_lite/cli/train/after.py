"""What `train` and `eval` say at their end: base beside adapter, the rows that fail, and the next three commands."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.cli.output import print_table
from adapterhub_lite.runs.folder import read_run

SHOWN_ROWS, SHOWN_CHARACTERS = 5, 100


def show_report(run: Path) -> None:
    """Print the report of the run in the folder `run`, where it has one."""
    found = read_run(run)
    report = found.report() if found else None
    if not report:
        return
    scores = [("loss", report["loss"])] + ([("exact_match", report["exact_match"])] if "exact_match" in report else [])
    rows = [(name, f"{pair['base']:.3f}", f"{pair['adapter']:.3f}") for name, pair in scores]
    print_table(f"On {report['held_out']} held-out rows", ("metric", "base", "adapter"), rows)
    show_failures([row for row in report["rows"] if row["adapter"].strip() != row["wanted"].strip()])


def show_failures(failed: Sequence[Mapping[str, Any]]) -> None:
    """Print the first rows that an adapter did not answer as wanted, each with `prompt`, `wanted` and `adapter`."""
    if not failed:
        return
    shown = [tuple(cut(str(row[key])) for key in ("prompt", "wanted", "adapter")) for row in failed[:SHOWN_ROWS]]
    title = f"Rows that fail: {len(failed)}, of which {len(shown)} are shown"
    print_table(title, ("asked", "wanted", "answered"), shown, names=False)


def cut(text: str) -> str:
    """A text on one line, as long as a cell of a table may be."""
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARACTERS else flat[: SHOWN_CHARACTERS - 1] + "…"


def next_steps(manifest: AdapterManifest, data: str | None, task: str | None, base: str) -> str:
    """The three commands that people want after `train`."""
    question = shlex.quote(manifest.examples[0] if manifest.examples else "your question")
    on = ["--base", base] if base != "smollm2-135m" else []
    rows = ["--data", data] if data else ["--task", str(task)]
    lines = [
        f"adapterhub-lite ask {manifest.name} {question} {shlex.join(on)}",
        f"adapterhub-lite eval {manifest.name} {shlex.join([*rows, *on])}",
        f"adapterhub-lite alias {manifest.name} prod {manifest.version}",
    ]
    return "Next:\n" + "\n".join(f"  {line.strip()}" for line in lines)
