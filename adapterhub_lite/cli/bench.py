"""`bench`: the project's own measurements, from a checkout of it."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, JsonOption, print_json, print_table, say, would
from adapterhub_lite.errors import ConfigurationError, UnknownNameError

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "scripts" / "bench"


def bench(
    name: Annotated[str | None, typer.Argument(help="Which; without one, those that there are are listed.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="What the bench itself takes, after `--`.")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: run one bench, which writes its figures and plot to scripts/bench/results.

    Example: `adapterhub-lite bench registry -- --versions 1000`
    """
    if not BENCHES.is_dir():
        raise ConfigurationError(
            "The benches are in a checkout of the project, not in the installed package: run this from one."
        )
    known = find_benches()
    if name is None:
        rows = [{"name": one, "question": found.question} for one, found in known.items()]
        if as_json:
            return print_json(rows)
        return print_table("Benches", ("name", "question"), [tuple(row.values()) for row in rows])
    if name not in known:
        raise UnknownNameError.among("bench", name, list(known))
    command = [sys.executable, "-m", f"scripts.bench.{known[name].room}.{name}", *(arguments or [])]
    if dry_run:
        return would(f"run {' '.join(['python', *command[1:]])}", as_json, command=command)
    before = _results()
    # With --json, standard output is for our document alone: what the bench prints goes to standard error.
    done = subprocess.run(command, cwd=ROOT, stdout=2 if as_json else None, check=False)
    written = sorted(str(path) for path, when in _results().items() if before.get(path) != when)
    if as_json:
        print_json({"name": name, "returncode": done.returncode, "written": written})
    elif written:
        say("Written: " + ", ".join(written))
    if done.returncode:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Bench:
    """A file of `scripts/bench` that can be run: the folder it lies in, and the question it answers."""

    room: str
    question: str


def find_benches() -> dict[str, Bench]:
    """Every bench of this checkout, by name."""
    found = {}
    for path in sorted(BENCHES.glob("*/*.py"), key=lambda path: path.stem):
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            question = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
            found[path.stem] = Bench(path.parent.name, question)
    return found


def _results() -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in (BENCHES / "results").glob("*")}
