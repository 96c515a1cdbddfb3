"""A training run for people: its state as a card, its losses as curves, its answers as rows. HTML of this module's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_app.display.charts import draw_curves
from adapterhub_app.display.escape import in_template, one_line
from adapterhub_app.durations import time_words
from adapterhub_lite.runs.folder import Run, seconds_since
from adapterhub_lite.training.data.preview import PreviewRow

GIB = 2**30
STAGES = {
    "waiting": "waits for its turn: one run trains at a time",
    "preparing": "reads the rows and loads the base",
    "training": "trains",
    "reporting": "asks base and adapter the held-out rows",
    "finished": "finished",
    "stopped": "stopped; what it has learned is saved",
    "interrupted": "interrupted: its process is gone",
    "failed": "failed",
}
SAMPLE_COLUMNS = ("Step", "Asked", "Wanted", "Answered")
REPORT_COLUMNS = ("Asked", "Wanted", "Base", "Adapter", "Right")
# In pixels, all of them in sight on a page of 1,280, and a phone scrolls the table instead of shrinking its cells.
SAMPLE_WIDTHS = ("70px", "350px", "350px", "350px")
REPORT_WIDTHS = ("265px", "265px", "265px", "265px", "75px")
MOST_SAMPLES = 12
CELL = 160
SKELETON = (
    '<div class="skeleton" role="img" aria-label="The losses come with the first steps"><i></i><i></i><i></i></div>'
)


def describe_run(run: Run, usual: float | None = None) -> str:
    """The card of a run: what it does, how far it is, and its figures; `usual` are the seconds of its stage the last time."""
    state = run.state
    done = f"{state.step} of {state.steps} steps" if state.steps else f"{state.step} steps"
    figures = [("Progress", done), *figures_of(run)]
    facts = "".join(
        f"<div><dt>{in_template(label)}</dt><dd>{in_template(value)}</dd></div>" for label, value in figures
    )
    bar = "" if run.stage in ("finished", "failed") else progress_bar(run, done)
    problem = f'<p class="problem" role="alert">{in_template(state.problem)}</p>' if state.problem else ""
    added = f" · added as {in_template(state.reference)}" if state.reference else ""
    # The losses' place, until there are some.
    waits = SKELETON if run.is_under_way and not run.curve() else ""
    return (
        f'<section class="run-card stage-{run.stage}"><h3>{in_template(run.name)} <span class="stage">{in_template(STAGES[run.stage])}'
        f"{in_template(stage_time(run, usual))}{added}</span></h3>{bar}{problem}<dl>{facts}</dl>{waits}</section>"
    )


def progress_bar(run: Run, done: str) -> str:
    """How far a run is; while it makes no steps, only that something goes on."""
    if run.is_under_way and run.stage != "training":
        return f'<progress aria-label="{in_template(STAGES[run.stage])}"></progress>'
    share = 100 * run.state.step / run.state.steps if run.state.steps else 0
    return f'<progress max="100" value="{share:.1f}" aria-label="{in_template(done)}"></progress>'


def stage_time(run: Run, usual: float | None) -> str:
    """For how long a run has been in a stage without steps, and how long it was the last time."""
    if not run.is_under_way or run.stage == "training" or not run.state.since:
        return ""
    last = "" if usual is None else f", {time_words(usual)} the last time"
    return f", for {time_words(seconds_since(run.state.since))}{last}"


def figures_of(run: Run) -> list[tuple[str, str]]:
    """(label, value) of what is known of a run: losses, speed, memory beside the prediction, time left."""
    found: list[tuple[str, str]] = []
    for label, key in (("Loss", "loss"), ("Held-out loss", "eval_loss")):
        value = run.last(key)
        if value is not None:
            found.append((label, f"{value:.4g}"))
    speed, peak = run.last("tokens_per_second"), run.last("peak_bytes")
    if speed is not None:
        found.append(("Speed", f"{speed:,.0f} tokens/s"))
    predicted = run.state.predicted_bytes
    if peak is not None and predicted:
        found.append(("Memory", f"{peak / GIB:.2f} GiB, predicted {predicted / GIB:.2f}"))
    elif predicted:
        found.append(("Memory", f"predicted {predicted / GIB:.2f} GiB"))
    if run.is_under_way and run.state.seconds_left is not None:
        found.append(("Time left", time_words(run.state.seconds_left)))
    return found


def draw_run(run: Run) -> str:
    """The losses of a run by step; empty before the first."""
    return draw_curves([("training", run.curve()), ("held out", run.curve("eval_loss"))])


def sample_rows(run: Run) -> list[list[Any]]:
    """The newest sample answers, newest first."""
    samples = run.samples()[-MOST_SAMPLES:][::-1]
    return [
        [one.get("step"), *(one_line(str(one.get(key, "")), CELL) for key in ("prompt", "wanted", "found"))]
        for one in samples
    ]


def report_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The held-out rows of a report, those that fail first."""
    rows = sorted(report.get("rows", ()), key=lambda row: row["adapter"].strip() == row["wanted"].strip())
    return [
        [
            *(one_line(str(row[key]), CELL) for key in ("prompt", "wanted", "base", "adapter")),
            "yes" if row["adapter"].strip() == row["wanted"].strip() else "no",
        ]
        for row in rows
    ]


def report_words(report: Mapping[str, Any]) -> str:
    """The scores of base and adapter as a sentence of Markdown."""
    loss = report["loss"]
    parts = [f"**Loss** on {report['held_out']} held-out rows: base {loss['base']:.3f}, adapter {loss['adapter']:.3f}."]
    if "exact_match" in report:
        right, count = report["exact_match"], len(report["rows"])
        parts.append(
            f"**Right, word for word**, of {count} answers: base {right['base'] * count:.0f}, "
            f"adapter {right['adapter'] * count:.0f}."
        )
    return " ".join(parts)


def token_pieces(row: PreviewRow) -> list[tuple[str, str]]:
    """The stretches of an example as (text, what becomes of it)."""
    return [(text, kind_of(weight)) for text, weight in row.pieces() if text]


def kind_of(weight: float) -> str:
    """What a weight in the loss means for a token."""
    return "only seen" if not weight else "learned" if weight == 1 else f"learned ×{weight:g}"


def left_out_words(count: int, reasons: Sequence[str]) -> str:
    """How many rows are left out, and the first reasons."""
    if not count:
        return ""
    listed = "\n".join(f"- {one_line(reason, 220)}" for reason in reasons)
    more = f"\n- and {count - len(reasons)} more" if count > len(reasons) else ""
    return f"{rows_are(count)} left out:\n{listed}{more}"


def rows_are(count: int) -> str:
    """So many rows, as the beginning of what becomes of them."""
    return "1 row is" if count == 1 else f"{count} rows are"
