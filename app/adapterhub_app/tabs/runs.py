"""The Runs tab: every training run with its figures, curves laid over each other, and what differs between two."""

from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.charts import draw_curves
from adapterhub_app.display.escape import literal_markdown, one_line, sentence
from adapterhub_app.tabs.run_panel import SHOW_RUN, RunPanel
from adapterhub_lite.runs.compare import compare_runs
from adapterhub_lite.runs.folder import Run, find_run, list_runs

COLUMNS = ("Run", "State", "Steps", "Loss", "Held-out loss", "Data", "Version", "Begun (UTC)")
WIDTHS = ("245px", "90px", "100px", "90px", "140px", "200px", "105px", "160px")
DIFFERENCES = ("What", "One", "Other")
MOST_RUNS = 4
EMPTY = "### No runs yet\nA run begins in the **Train** tab, or with `adapterhub-lite train` in a terminal, and stands here from then on."


def run_rows(runs: list[Run]) -> list[list[Any]]:
    """One row per run, the newest first."""
    return [
        [
            run.name, run.stage, f"{run.state.step} of {run.state.steps}", rounded(run.last("loss")),
            rounded(run.last("eval_loss")), one_line(run.state.data, 60), run.state.reference or "",
            run.state.created[:16].replace("T", " "),
        ]
        for run in runs
    ]  # fmt: skip


def rounded(value: float | None) -> str:
    """A loss with four digits."""
    return "" if value is None else f"{value:.4g}"


def curves_of(runs: list[Run]) -> str:
    """The losses of runs over each other: the held-out ones where every run has them, else those of training."""
    held_out = all(run.curve("eval_loss") for run in runs)
    key, kind = ("eval_loss", "held-out") if held_out else ("loss", "training")
    return draw_curves([(f"{run.name} ({kind})", run.curve(key)) for run in runs])


def difference_rows(backend: Backend, one: Run, other: Run) -> list[list[str]]:
    """What differs between two runs, their scores, and how alike what they learned is."""
    found = compare_runs(one, other)
    rows = [[name, _cell(ours), _cell(theirs)] for name, (ours, theirs) in {**found.settings, **found.facts}.items()]
    rows += [[f"score: {name}", _cell(ours), _cell(theirs)] for name, (ours, theirs) in found.scores.items()]
    first, second = one.state.reference, other.state.reference
    if first and second and first != second:
        layers = backend.registry.diff(first, second).layers
        if layers:
            alike = sum(layer.output_similarity for layer in layers) / len(layers)
            rows.append(
                ["what they learned", f"{alike:.3f} alike over {len(layers)} modules", "1 is the same directions"]
            )
    return rows


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else one_line(str(value), 80)


def build_runs_tab(backend: Backend, panel: RunPanel | None, tabs: gr.Tabs, shown: Any) -> None:
    """Lay out the tab and connect it; `shown` is the event of the tab being selected, `panel` the Train tab's."""
    empty = gr.Markdown(EMPTY, elem_classes="notice", elem_id="runs-empty", visible=False)
    table = gr.Dataframe(
        headers=list(COLUMNS), datatype="str", interactive=False, column_widths=list(WIDTHS), max_height=320,
        show_label=False, label="Training runs", elem_id="runs-table", elem_classes="plain-table", buttons=[], wrap=False,
    )  # fmt: skip
    with gr.Row(equal_height=True, visible=False, elem_id="runs-picked") as picking:
        picked = gr.Dropdown(
            choices=[], value=[], multiselect=True, max_choices=MOST_RUNS, label="Lay over each other",
            info="Pick rows above, or here; of the first two it is said what differs", elem_id="runs-pick", scale=4,
        )  # fmt: skip
        open_it = gr.Button(
            "Open in Train", elem_id="runs-open", interactive=False, scale=1, min_width=120, visible=panel is not None
        )
    curves = gr.HTML(visible=False, padding=False, elem_id="runs-curves")
    differences = gr.Dataframe(
        headers=list(DIFFERENCES), datatype="str", interactive=False, wrap=True, visible=False, buttons=[],
        label="What differs", elem_id="runs-differences", elem_classes="plain-table", column_widths=["240px", "440px", "440px"],
    )  # fmt: skip
    problem = gr.Markdown(elem_classes="problem", visible=False, elem_id="runs-problem")

    def on_show(chosen: list[str]) -> list[Any]:
        runs = list_runs(backend.registry.home)
        names = [run.name for run in runs]
        kept = gr.Dropdown(choices=names, value=[name for name in chosen or [] if name in names])
        table_of = gr.Dataframe(value=run_rows(runs), visible=bool(runs))
        return [gr.Markdown(visible=not runs), table_of, gr.Row(visible=bool(runs)), kept]

    def on_row(chosen: list[str], event: gr.SelectData) -> list[str]:
        name = event.row_value[0]
        rest = [one for one in chosen or [] if one != name]
        return rest if name in (chosen or []) else [*rest, name][-MOST_RUNS:]

    def on_pick(chosen: list[str]) -> list[Any]:
        try:
            runs = [find_run(name, backend.registry.home) for name in chosen or []]
            drawn = curves_of(runs) if runs else ""
            rows = difference_rows(backend, runs[0], runs[1]) if len(runs) > 1 else []
        except Exception as error:  # the boundary to the page
            hidden = [gr.HTML(visible=False), gr.Dataframe(visible=False), gr.Button(interactive=False)]
            return [*hidden, gr.Markdown(literal_markdown(sentence(error)), visible=True)]
        heads = ["What", runs[0].name, runs[1].name] if len(runs) > 1 else list(DIFFERENCES)
        table_of = gr.Dataframe(value=rows, headers=heads, visible=bool(rows))
        return [
            gr.HTML(drawn, visible=bool(drawn)), table_of, gr.Button(interactive=bool(runs)), gr.Markdown(visible=False)
        ]  # fmt: skip

    quiet = {"queue": False, "show_progress": "hidden"}
    shown(on_show, picked, [empty, table, picking, picked], **quiet)
    table.select(on_row, picked, picked, **quiet)
    picked.change(on_pick, picked, [curves, differences, open_it, problem], show_progress="hidden")
    if panel is not None:
        watching = panel

        def on_open(chosen: list[str]) -> list[Any]:
            run = find_run(chosen[-1], backend.registry.home)
            return [gr.Tabs(selected="train"), run.name, *watching.updates(run)]

        open_it.click(on_open, picked, [tabs, panel.picked, *panel.outputs], **quiet).then(None, js=SHOW_RUN)
