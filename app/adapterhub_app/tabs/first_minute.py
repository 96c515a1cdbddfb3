"""What an empty registry says: three ways to a first task, each a button that does it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app import training
from adapterhub_app.backend import Backend
from adapterhub_app.display.escape import literal_markdown, sentence
from adapterhub_app.display.task import task_choices
from adapterhub_app.durations import time_words
from adapterhub_app.tabs.run_panel import SHOW_RUN, RunPanel
from adapterhub_lite.runs.folder import list_runs, seconds_since

EXAMPLE = "sql"
EXAMPLE_SETTINGS = {
    "steps": 30, "batch_size": 8, "learning_rate": 3e-3, "validation_split": training.HELD_OUT, "save_steps": 0.2
}  # fmt: skip
STARTING = "Draws the rows and starts"
WORDS = (
    "### Nothing here has learned a task yet\n"
    "The base answers as it is. A task is a small adapter on it, trained from examples of question and answer."
)


@dataclass(frozen=True)
class FirstMinute:
    """The parts of the panel: `box` is shown while the registry is empty."""

    box: gr.Column
    example: gr.Button
    own: gr.Button
    pull: gr.Button
    folder: gr.UploadButton
    naming: gr.Row
    name: gr.Textbox
    add: gr.Button
    problem: gr.Markdown


def is_empty(backend: Backend) -> bool:
    """Whether there is no adapter yet."""
    return not backend.registry.list()


def example_words(backend: Backend) -> str:
    """The button's words, with the time that the example took here the last time."""
    steps = EXAMPLE_SETTINGS["steps"]
    for run in list_runs(backend.registry.home):
        if run.stage == "finished" and run.state.data.endswith(f"tasks/{EXAMPLE}"):
            took = seconds_since(run.state.created) - seconds_since(run.state.changed)
            return f"Train the SQL example: {steps} steps, {time_words(took)} the last time"
    return f"Train the SQL example: {steps} steps"


def build_first_minute(backend: Backend) -> FirstMinute:
    """Lay out the panel."""
    with gr.Column(visible=is_empty(backend), elem_id="first-minute") as box:
        gr.Markdown(WORDS)
        with gr.Row(elem_classes="natural"):
            example = gr.Button(example_words(backend), variant="primary", elem_id="first-example")
            own = gr.Button("Train from my own file", elem_id="first-own")
            pull = gr.Button("Pull one from a hub", elem_id="first-pull")
            folder = gr.UploadButton(
                "Add an adapter's folder", file_count="directory", elem_id="first-folder", size="md"
            )
        with gr.Row(visible=False, equal_height=True, elem_id="first-naming") as naming:
            name = gr.Textbox(
                label="Name of the task", placeholder="support-answers", max_length=64, elem_id="first-name",
                info="Letters, digits, dots, dashes", scale=3,
            )  # fmt: skip
            add = gr.Button("Add and switch to it", variant="primary", elem_id="first-add", scale=1, min_width=140)
        problem = gr.Markdown(elem_classes="problem", visible=False, elem_id="first-problem")
    return FirstMinute(box, example, own, pull, folder, naming, name, add, problem)


def connect_first_minute(
    backend: Backend, first: FirstMinute, panel: RunPanel | None, task: gr.Dropdown, tabs: gr.Tabs
) -> None:
    """Connect the buttons to the tabs that do it; `panel` is the Train tab's, None where nothing can be trained."""

    def failed(error: Exception, others: int) -> list[Any]:
        return [gr.Markdown(literal_markdown(sentence(error)), visible=True), *[gr.skip()] * others]

    def on_folder(files: list[str] | None) -> list[Any]:
        return [gr.Row(visible=True), training.name_in(files or []), gr.Markdown(visible=False)]

    def on_add(files: list[str] | None, called: str, request: gr.Request) -> list[Any]:
        try:
            manifest = training.add_folder(backend, request.username, files or [], called)
        except Exception as error:  # the boundary to the page
            return failed(error, 3)
        choices = task_choices(backend.registry, backend.base_name, backend.engine.base_fingerprint)
        return [
            gr.Markdown(visible=False),
            gr.Column(visible=False),
            gr.Dropdown(choices, value=manifest.name),
            gr.Tabs(selected="chat"),
        ]

    def to(tab: str) -> Callable[[], Any]:
        return lambda: gr.Tabs(selected=tab)

    quiet = {"queue": False, "show_progress": "hidden"}
    first.folder.upload(on_folder, first.folder, [first.naming, first.name, first.problem], show_progress="hidden")
    gr.on(
        [first.add.click, first.name.submit], on_add, [first.folder, first.name], [first.problem, first.box, task, tabs],
        trigger_mode="once", show_progress_on=first.problem,
    )  # fmt: skip
    first.pull.click(to("registry"), None, tabs, **quiet)
    first.own.click(to("train"), None, tabs, **quiet)
    if panel is None:
        first.example.click(to("train"), None, tabs, **quiet)
        return

    def on_example(request: gr.Request) -> Iterator[list[Any]]:
        rest = 3 + len(panel.outputs)
        doing = gr.Button(backend.durations.waiting("example", STARTING), interactive=False)
        yield [doing, *[gr.skip()] * rest]
        again = gr.Button(example_words(backend), interactive=True)
        try:
            with backend.durations.measure("example"):
                recipe = training.recipe_of(EXAMPLE_SETTINGS)
                look = training.look_at(backend, training.Source(task=EXAMPLE), recipe)
                run = training.start_run(backend, request.username, EXAMPLE, look, recipe)
        except Exception as error:  # the boundary to the page
            yield [again, *failed(error, rest - 1)]
            return
        yield [again, gr.Markdown(visible=False), gr.Tabs(selected="train"), run.name, *panel.updates(run)]

    started = first.example.click(
        on_example, None, [first.example, first.problem, tabs, panel.picked, *panel.outputs], trigger_mode="once",
        show_progress="hidden",
    )  # fmt: skip
    started.then(None, js=SHOW_RUN)
