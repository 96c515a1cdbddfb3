"""One training run on the page: watched while it goes on, stopped and kept, resumed, and its adapter added and switched to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app import training
from adapterhub_app.backend import Backend
from adapterhub_app.bases import base_of_run, is_served, serving_words
from adapterhub_app.display.escape import literal_markdown, sentence
from adapterhub_app.display.runs import (
    REPORT_COLUMNS,
    REPORT_WIDTHS,
    SAMPLE_COLUMNS,
    SAMPLE_WIDTHS,
    describe_run,
    draw_run,
    report_rows,
    report_words,
    sample_rows,
)
from adapterhub_app.display.task import task_choices
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.runs.folder import Run, find_run, last_took, list_runs
from adapterhub_lite.runs.starting import resume, stop

SECONDS_BETWEEN_LOOKS = 1.0
STOP, STOPPING = "Stop and keep what is learned", "Stops after the step it is in…"
ADD_AND_SWITCH, ADD = "Add and switch to it", "Add to the registry"
ADDING = "Checks the adapter and adds it"
# Brings the panel into sight, once it is drawn; not where something was refused instead.
SHOW_RUN = """() => {
  const show = tries => {
    const panel = document.querySelector("#run-panel")
    if (!panel?.offsetParent) return tries && setTimeout(show, 100, tries - 1)
    if (document.querySelector("#train-problem")?.offsetParent) return
    const place = panel.getBoundingClientRect(), still = matchMedia("(prefers-reduced-motion: reduce)").matches
    if (place.top < 0 || place.bottom > innerHeight)
      panel.scrollIntoView({block: place.height < innerHeight ? "center" : "start", behavior: still ? "auto" : "smooth"})
  }
  setTimeout(show, 200, 20)
}"""


@dataclass(frozen=True)
class RunPanel:
    """The panel's parts: `picked` holds the run's name, `outputs` are what `updates` are for."""

    backend: Backend
    picked: gr.Textbox
    outputs: list[Any]

    def updates(self, run: Run | None) -> list[Any]:
        """What the panel shows of a run, in the order of `outputs`."""
        if run is None:
            return [gr.Column(visible=False), *[gr.skip()] * (len(self.outputs) - 2), gr.Timer(active=False)]
        report, samples, curve = run.report(), sample_rows(run), draw_run(run)
        can_keep = not run.is_under_way and run.adapter is not None and run.state.reference is None
        name, served = run.folder.parent.name, is_served(self.backend, run)
        return [
            gr.Column(visible=True),
            describe_run(run, usual_seconds(run)),
            gr.HTML(curve, visible=bool(curve)),
            gr.Dataframe(value=samples, visible=bool(samples) and report is None),
            gr.Button(STOP, interactive=True, visible=run.is_under_way),
            gr.Button(visible=run.can_resume),
            gr.Markdown(report_words(report) if report else "", visible=report is not None),
            gr.Dataframe(value=report_rows(report) if report else [], visible=bool(report and report.get("rows"))),
            gr.Group(visible=can_keep),
            gr.Textbox(value=name) if can_keep else gr.skip(),
            gr.Button(ADD_AND_SWITCH if served else ADD, interactive=True),
            gr.Markdown("" if served else elsewhere_words(self.backend, run), visible=not served),
            gr.Button(visible=served and run.state.reference is not None),
            gr.Timer(active=run.is_under_way),
        ]

    def untouched(self) -> list[Any]:
        """No change at all."""
        return [gr.skip()] * len(self.outputs)


def usual_seconds(run: Run) -> float | None:
    """How long the stage that a run is in took the last time; None where that says nothing."""
    if not run.is_under_way or run.stage not in ("preparing", "reporting"):
        return None
    return last_took(list_runs(run.folder.parents[2]), run)


def elsewhere_words(backend: Backend, run: Run) -> str:
    """What is to be known of a run on another base than the one that is served here."""
    try:
        way = f"To chat with it, enter `{serving_words(base_of_run(backend, run))}` in a terminal."
    except AdapterHubError as error:
        way = literal_markdown(sentence(error))
    return (
        f"This run is on **{literal_markdown(Path(run.state.base).name)}**, and the engine of this page serves "
        f"**{literal_markdown(backend.base_name)}**. What it learns is kept in the same registry. {way}"
    )


@dataclass(frozen=True)
class PanelParts:
    """What is pressed and written on the panel, and where it says what went wrong."""

    halt: gr.Button
    again: gr.Button
    name: gr.Textbox
    about: gr.Textbox
    add: gr.Button
    use: gr.Button
    timer: gr.Timer
    problem: gr.Markdown


def build_run_panel(backend: Backend, task: gr.Dropdown, tabs: gr.Tabs, opened: Any) -> RunPanel:
    """Lay out the panel and connect it; when a page is opened it shows the run under way, or the one not yet kept."""
    panel, parts = lay_out(backend)
    connect_watching(backend, panel, parts, opened)
    connect_changes(backend, panel, parts)
    connect_adding(backend, panel, parts, task, tabs)
    return panel


def lay_out(backend: Backend) -> tuple[RunPanel, PanelParts]:
    """The run's card, its curve, its answers on the way and at the end, and what keeps its adapter."""
    picked = gr.Textbox(visible=False, value="")
    timer = gr.Timer(SECONDS_BETWEEN_LOOKS, active=False)
    with gr.Column(visible=False, elem_id="run-panel") as box:
        card = gr.HTML(padding=False, elem_id="run-card")
        with gr.Row(elem_classes="natural"):
            halt = gr.Button(STOP, size="sm", visible=False, elem_id="run-stop")
            again = gr.Button("Resume", size="sm", visible=False, elem_id="run-resume")
        curve = gr.HTML(visible=False, padding=False, elem_id="run-curve")
        samples = gr.Dataframe(
            headers=list(SAMPLE_COLUMNS), datatype="str", interactive=False, wrap=True, label="Sample answers",
            visible=False, elem_id="run-samples", elem_classes="plain-table", buttons=[], max_height=260,
            column_widths=list(SAMPLE_WIDTHS),
        )  # fmt: skip
        words = gr.Markdown(visible=False, elem_id="run-report", elem_classes="notice")
        answers = gr.Dataframe(
            headers=list(REPORT_COLUMNS), datatype="str", interactive=False, wrap=True, visible=False,
            label="Held-out rows, those that fail first", elem_id="run-answers", elem_classes="plain-table", buttons=[],
            max_height=360, column_widths=list(REPORT_WIDTHS),
        )  # fmt: skip
        with gr.Group(visible=False, elem_id="run-keep") as keep:
            with gr.Row():
                name = gr.Textbox(label="Name", max_length=64, elem_id="run-name", min_width=140)
                about = gr.Textbox(
                    label="What it does, in a few words", placeholder="A question to SQL", max_length=200,
                    elem_id="run-about", min_width=220, scale=2,
                )  # fmt: skip
            add = gr.Button(ADD_AND_SWITCH, variant="primary", elem_id="run-add")
        elsewhere = gr.Markdown(visible=False, elem_id="run-elsewhere", elem_classes="notice")
        use = gr.Button("Use in chat", visible=False, elem_id="run-use")
        problem = gr.Markdown(elem_classes="problem", visible=False, elem_id="run-problem")
    outputs = [box, card, curve, samples, halt, again, words, answers, keep, name, add, elsewhere, use, timer]
    return RunPanel(backend, picked, outputs), PanelParts(halt, again, name, about, add, use, timer, problem)


def look(backend: Backend, run_name: str) -> Run | None:
    """The run that the panel shows; None where it shows none, or one that is no longer there."""
    try:
        return find_run(run_name, backend.registry.home) if run_name else None
    except AdapterHubError:
        return None


def connect_watching(backend: Backend, panel: RunPanel, parts: PanelParts, opened: Any) -> None:
    """Connect what shows a run when the page is opened, and how far it is while it goes on."""

    def on_tick(run_name: str) -> list[Any]:
        run = look(backend, run_name)
        found = panel.updates(run)
        if run is not None and run.is_under_way:
            # While it goes on nobody types here, and what was typed stays; and who has pressed Stop has pressed it.
            for untouched in (parts.name, parts.halt):
                found[panel.outputs.index(untouched)] = gr.skip()
        return found

    def on_open() -> str:
        runs = list_runs(backend.registry.home)
        run = next((one for one in runs if one.is_under_way), None)
        run = run or next((one for one in runs if one.state.reference is None), None)
        return run.name if run else ""

    def on_taken(run_name: str) -> list[Any]:
        run = look(backend, run_name)
        # The timer stands still at an opening; where it runs, somebody has started another run meanwhile.
        return panel.updates(run) if run is not None and run.is_under_way else [*panel.updates(run)[:-1], gr.skip()]

    quiet = {"show_progress": "hidden", "queue": False}
    parts.timer.tick(on_tick, panel.picked, panel.outputs, **quiet)
    # Who has started or opened a run before the server has answered sees that one.
    newest = gr.Textbox(visible=False)
    found = opened(on_open, None, newest, **quiet)
    taken = found.then(None, [panel.picked, newest], panel.picked, js="(picked, newest) => [picked || newest]")
    taken.then(on_taken, panel.picked, panel.outputs, **quiet)


def connect_changes(backend: Backend, panel: RunPanel, parts: PanelParts) -> None:
    """Connect what stops a run and what resumes it."""

    def act(action: Callable[[Run], Any]) -> Callable[..., list[Any]]:
        def handler(run_name: str, request: gr.Request) -> list[Any]:
            try:
                backend.access.require_admin(request.username, "change a run")
                action(find_run(run_name, backend.registry.home))
            except Exception as error:  # the boundary to the page
                return [gr.Markdown(literal_markdown(sentence(error)), visible=True), *panel.untouched()]
            run = look(backend, run_name)
            found = panel.updates(run)
            if action is stop and run is not None and run.is_under_way:
                found[panel.outputs.index(parts.halt)] = gr.Button(STOPPING, interactive=False)
            return [gr.Markdown(visible=False), *found]

        return handler

    for button, action in ((parts.halt, stop), (parts.again, resume)):
        button.click(
            act(action), panel.picked, [parts.problem, *panel.outputs], trigger_mode="once", show_progress="hidden"
        )


def connect_adding(backend: Backend, panel: RunPanel, parts: PanelParts, task: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Connect what adds a run's adapter to the registry, and what switches the chat to it."""

    def on_add(run_name: str, called: str, does: str, request: gr.Request) -> Iterator[list[Any]]:
        at = panel.outputs.index(parts.add)
        doing = panel.untouched()
        doing[at] = gr.Button(backend.durations.waiting("add", ADDING), interactive=False)
        yield [gr.Markdown(visible=False), gr.skip(), gr.skip(), *doing]
        try:
            run = find_run(run_name, backend.registry.home)
            with backend.durations.measure("add"):
                manifest = training.keep_adapter(backend, request.username, run, called, does)
        except Exception as error:  # the boundary to the page
            told = gr.Markdown(literal_markdown(sentence(error)), visible=True)
            again = panel.untouched()
            again[at] = panel.updates(look(backend, run_name))[at]
            yield [told, gr.skip(), gr.skip(), *again]
            return
        choices = task_choices(backend.registry, backend.base_name, backend.engine.base_fingerprint)
        switched = [gr.Dropdown(choices=choices), gr.skip()]
        if is_served(backend, run):
            switched = [gr.Dropdown(choices=choices, value=manifest.name), gr.Tabs(selected="chat")]
        yield [gr.Markdown(visible=False), *switched, *panel.updates(look(backend, run_name))]

    def on_use(run_name: str) -> list[Any]:
        run = look(backend, run_name)
        return [gr.Dropdown(value=run.state.reference if run else None), gr.Tabs(selected="chat")]

    parts.add.click(
        on_add, [panel.picked, parts.name, parts.about], [parts.problem, task, tabs, *panel.outputs],
        trigger_mode="once", show_progress="hidden",
    )  # fmt: skip
    parts.use.click(on_use, panel.picked, [task, tabs], show_progress="hidden", queue=False)
