"""`runs`: every training run of this home with its state and figures, one of them in full, or two compared."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table, say, shown_number
from adapterhub_lite.cli.train.after import show_report
from adapterhub_lite.errors import UsageError
from adapterhub_lite.runs.compare import RunDifference, compare_runs, scores_of
from adapterhub_lite.runs.folder import Run, find_run, list_runs
from adapterhub_lite.runs.starting import typed

# Of a run's key, in the table of all runs.
SHOWN_DIGITS = 6


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="A run (NAME, NAME/KEY or the beginning of a key) to show; or `compare` and two of them."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List training runs, show one, or compare two: settings, data, scores, and the subspaces of what they learned.

    Example: `adapterhub-lite runs compare sql/3fa1 sql/9c04`
    """
    chosen = names or []
    if chosen[:1] == ["compare"]:
        if len(chosen) != 3:
            raise UsageError("`runs compare` takes two runs, such as `adapterhub-lite runs compare sql/3fa1 sql/9c04`.")
        return compare(find_run(chosen[1], home), find_run(chosen[2], home), home, as_json)
    if len(chosen) > 1:
        raise UsageError("Give one run to show, or `compare` and two of them.")
    if chosen:
        return show(find_run(chosen[0], home), as_json)
    found = list_runs(home)
    if as_json:
        return print_json([as_document(run) for run in found])
    if not found:
        return say("No runs yet. Begin with `adapterhub-lite train sql --task sql`, an example task.")
    rows = [
        (
            short_name(run), stage_and_steps(run), *(loss_of(run, key) for key in ("loss", "eval_loss")),
            run.state.reference or "-", run.state.created[5:16].replace("T", " "),
        )
        for run in found
    ]  # fmt: skip
    heads = ("run", "state", "loss", "held out", "version", "begun (UTC)")
    return print_table("Training runs", heads, rows)


def short_name(run: Run) -> str:
    """A run as `NAME/KEY` with the beginning of its key, which is enough to find it by."""
    return f"{run.folder.parent.name}/{run.folder.name[:SHOWN_DIGITS]}"


def stage_and_steps(run: Run) -> str:
    """How far a run is, in as few letters as a terminal of 80 columns leaves to it."""
    done = run.state.step if run.state.step == run.state.steps else f"{run.state.step}/{run.state.steps}"
    return f"{run.stage} {done}" if run.state.steps else run.stage


def loss_of(run: Run, key: str) -> str:
    """The newest of a run's losses; a dash before the first, and where no rows are held out."""
    value = run.last(key)
    return "-" if value is None else shown_number(value)


def as_document(run: Run) -> dict[str, Any]:
    """A run as one JSON object."""
    return {
        "run": run.name,
        "folder": str(run.folder),
        **run.state.model_dump(),
        "stage": run.stage,
        "scores": scores_of(run),
    }


def show(run: Run, as_json: bool) -> None:
    """Say all that is known of a run, and what can be done with it now."""
    if as_json:
        return print_json({**as_document(run), "report": run.report(), "samples": run.samples()})
    state = run.state
    facts = [
        ("state", run.stage), ("steps", f"{state.step} of {state.steps}"), ("base", state.base),
        ("data", f"{state.data}: {state.rows} rows, {state.held_out} held out"), ("preset", state.preset or "-"),
        *((name, shown_number(value)) for name, value in scores_of(run).items()),
        ("folder", str(run.folder)),
    ]  # fmt: skip
    print_table(run.name, ("", ""), facts)
    show_report(run.folder)
    if state.problem:
        say(f"It failed: {state.problem}")
    if run.can_resume:
        say(f"To go on with it, in {state.cwd}: {typed(state.command)}")
    return None


def compare(one: Run, other: Run, home: str | None, as_json: bool) -> None:
    """Compare two runs, and where both are in the registry also what they learned, module by module."""
    found = compare_runs(one, other)
    layers = learned(one, other, home)
    if as_json:
        return print_json({**asdict(found), "layers": layers})
    show_difference(found)
    if not layers:
        return say("What they learned can be compared once both are in the registry: `adapterhub-lite add`.")
    rows = [(layer["module"], *(f"{layer[key]:.3f}" for key in SIMILARITIES)) for layer in layers]
    return print_table("What they learned, by module (1: the same directions)", ("module", *SIMILARITIES), rows)


SIMILARITIES = ("input_similarity", "output_similarity", "cosine")


def learned(one: Run, other: Run, home: str | None) -> list[dict[str, Any]]:
    """How alike the weight changes of two runs are, module by module; empty where one is not in the registry."""
    if one.state.reference is None or other.state.reference is None:
        return []
    from adapterhub_lite.registry import AdapterRegistry

    found = AdapterRegistry(home).diff(one.state.reference, other.state.reference)
    return [asdict(layer) for layer in found.layers]


def show_difference(found: RunDifference) -> None:
    """Print what differs, and the scores of both."""
    columns = (found.one, found.other)
    if differing := {**found.settings, **found.facts}:
        print_table("What differs", ("key", *columns), [(key, *pair) for key, pair in differing.items()])
    else:
        say("Settings, base and data are the same.")
    if found.scores:
        rows = [(key, *map(shown_number, pair)) for key, pair in found.scores.items()]
        print_table("Scores", ("score", *columns), rows)
