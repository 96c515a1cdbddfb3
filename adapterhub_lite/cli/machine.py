"""`doctor` and `bench`: what this machine can do, and how fast."""

import ast
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, print_table, say, would
from adapterhub_lite.errors import ConfigurationError, UnknownNameError

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "scripts" / "bench"


def doctor(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Rebuild the database from the manifests.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report what works on this machine, how to get what does not, and what is wrong in the registry.

    Exit code 1 means that the registry has a problem. Example: `adapterhub-lite doctor --rebuild`
    """
    from adapterhub_lite.diagnosis import diagnose
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    rebuilt = registry.rebuild() if rebuild else None
    findings, report = diagnose(home), registry.examine()
    if as_json:
        print_json(
            {
                "machine": [finding.model_dump(mode="json") for finding in findings],
                "registry": asdict(report),
                "rebuilt": asdict(rebuilt) if rebuilt else None,
            }
        )
    else:
        print_table(
            "This machine",
            ("capability", "works", "detail", "how to get it"),
            [(f.what, "yes" if f.works else "no", f.detail, f.remedy or "-") for f in findings],
        )
        if rebuilt:
            say(f"The database was rebuilt: {rebuilt.versions} versions, {rebuilt.aliases} aliases.")
            for line in rebuilt.skipped:
                say(f"  left out: {line}")
        say(f"Registry: {report.versions} versions, {report.objects} files, {len(report.problems)} problems.")
        for line in (*report.problems, *report.notes):
            say(f"  {line}")
    if not report.healthy:
        raise typer.Exit(1)


def bench(
    name: Annotated[str | None, typer.Argument(help="Name of the bench; without one, all benches are listed.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the bench itself, after `--`.")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: run one bench, which writes its figures and plot to scripts/bench/results.

    Example: `adapterhub-lite bench registry -- --versions 1000`
    """
    if not BENCHES.is_dir():
        raise ConfigurationError(
            "The benches are part of a checkout of the project, not of the installed package: run this from a checkout."
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
    # With --json, standard output holds our document only: the output of the bench goes to standard error.
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
    """A runnable file of `scripts/bench`: the folder it is in, and the question it answers."""

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
