"""What differs between two runs: settings, data, what came of them. Subspaces of the weights are the registry's `diff`."""

from dataclasses import dataclass
from typing import Any

from adapterhub_lite.runs.folder import Run

# What says where or when a run was, and nothing of what it is.
FACTS = ("base", "base_fingerprint", "data", "data_fingerprint", "rows", "held_out", "preset", "step")
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class RunDifference:
    """(value of one, value of the other) by name: of settings and facts only those that differ, of scores all."""

    one: str
    other: str
    settings: dict[str, Pair]
    facts: dict[str, Pair]
    scores: dict[str, Pair]


def compare_runs(one: Run, other: Run) -> RunDifference:
    """Compare two runs by what their folders say."""
    ours, theirs = one.state.settings, other.state.settings
    settings = {name: (ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})}
    facts = {name: (getattr(one.state, name), getattr(other.state, name)) for name in FACTS}
    scored, against = scores_of(one), scores_of(other)
    return RunDifference(
        one.name,
        other.name,
        {name: pair for name, pair in settings.items() if pair[0] != pair[1]},
        {name: pair for name, pair in facts.items() if pair[0] != pair[1]},
        {name: (scored.get(name), against.get(name)) for name in sorted({*scored, *against})},
    )


def scores_of(run: Run) -> dict[str, float]:
    """What was measured of a run: its last losses, speed and memory, and its report's exact match."""
    last = {name: run.last(name) for name in ("loss", "eval_loss", "tokens_per_second", "peak_bytes")}
    found = {name: value for name, value in last.items() if value is not None}
    report = run.report() or {}
    if "exact_match" in report:
        found["exact_match"] = float(report["exact_match"]["adapter"])
    return found
