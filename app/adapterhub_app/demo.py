"""The page: a masthead and one tab for each activity. Only the layout; each tab connects its own events."""

import os
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.access import Access
from adapterhub_app.backend import Backend
from adapterhub_app.display.escape import literal_markdown
from adapterhub_app.display.task import BASE, adapter_choices, task_choices
from adapterhub_app.display.transcript import read_turns
from adapterhub_app.events import at_last
from adapterhub_app.tabs.blend import build_blend_tab
from adapterhub_app.tabs.chat import ChatTab, build_chat_tab, facts_of, last_two
from adapterhub_app.tabs.compare import CompareTab, build_compare_tab
from adapterhub_app.tabs.first_minute import build_first_minute, connect_first_minute, is_empty
from adapterhub_app.tabs.plan import build_plan_tab
from adapterhub_app.tabs.registry import build_registry_tab
from adapterhub_app.tabs.runs import build_runs_tab
from adapterhub_app.tabs.task_cards import NUMBER_KEYS
from adapterhub_app.tabs.train import build_train_tab
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine

TITLE = "adapterhub-lite"
# Files that were given to the page are removed after a day; a run has its own copy of its rows.
FILES_KEPT_SECONDS = 86_400
# The chosen appearance is stored in the browser; the server never learns of it.
_TOGGLE_APPEARANCE = """() => {
  localStorage.setItem("appearance", document.body.classList.toggle("dark") ? "dark" : "light")
}"""
_KEPT_APPEARANCE = """() => {
  const kept = localStorage.getItem("appearance")
  if (kept) document.body.classList.toggle("dark", kept === "dark")
}"""


def build_demo(
    engine: InferenceEngine,
    registry: AdapterRegistry,
    *,
    base_name: str | None = None,
    base: ResolvedBase | None = None,
    access: Access | None = None,
    hub: str | None = None,
) -> gr.Blocks:
    """Build the app's page over a running engine and a registry; see `launch` for serving it.

    `base_name` is the displayed name of the engine's base (None: the short form of its fingerprint), `base` its files,
    needed to save blends when the base was given as a folder. `access` None means no login: everybody may write.
    `hub` is the endpoint for push and pull; None for the one configured in `huggingface_hub`.
    """
    named = base_name or f"base {engine.base_fingerprint[:8]}"
    backend = Backend(engine, registry, named, base=base, hub=hub, access=access or Access())
    # After every event Gradio summarises all events so far with pandas, which takes seconds on a long-lived page.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, FILES_KEPT_SECONDS)
    ) as demo:
        build_masthead(backend)
        first = build_first_minute(backend)
        task = gr.Dropdown(
            choices=task_choices(registry, named, engine.base_fingerprint), value=BASE, label="Task", allow_custom_value=True, render=False,
            elem_id="task", info="The base, an adapter, or any reference such as sql:2",
        )  # fmt: skip
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Chat", id="chat"):
                chat = build_chat_tab(backend, task, demo.load)
            with gr.Tab("Train", id="train"):
                panel = build_train_tab(backend, task, tabs, demo.load)
            with gr.Tab("Runs", id="runs") as runs_tab:
                build_runs_tab(backend, panel, tabs, runs_tab.select)
            with gr.Tab("Compare", id="compare"):
                compared = build_compare_tab(backend)
            with gr.Tab("Blend", id="blend"):
                blended = build_blend_tab(backend, task, tabs)
            with gr.Tab("Registry", id="registry") as registry_tab:
                build_registry_tab(backend, task, tabs, [demo.load, registry_tab.select])
            with gr.Tab("Plan", id="plan"):
                build_plan_tab(backend)

        connect_first_minute(backend, first, panel, task, tabs)
        keep_fresh(backend, [demo.load, tabs.change], [task, compared.picked, *blended], first.box)
        # A version that was added to the picked task changes no picker, and what is to be said of it all the same.
        at_last([demo.load, tabs.change, task.change], lambda picked: facts_of(backend, picked), task, chat.facts)
        connect_side_by_side(chat, compared, task, tabs)
        connect_page(demo, tabs)
        stop_when_left(backend, demo)
    return demo


def connect_page(demo: gr.Blocks, tabs: gr.Tabs) -> None:
    """What the page does without the server."""
    demo.load(None, js=_KEPT_APPEARANCE)
    demo.load(None, js=NUMBER_KEYS)
    # A tab is opened at its title, however far down the one before was read.
    tabs.change(None, js="() => scrollTo(0, 0)")


def stop_when_left(backend: Backend, demo: gr.Blocks) -> None:
    """When a person leaves the page, stop the answers that nobody will read."""

    def on_leave(request: gr.Request) -> None:
        backend.live.stop_all(str(request.session_hash))

    demo.unload(on_leave)


def keep_fresh(backend: Backend, events: list[Any], pickers: list[Any], first_minute: gr.Column) -> None:
    """At each of the events, let every picker, the task's first, offer the adapters that there are now."""

    def on_open() -> list[Any]:
        adapters = adapter_choices(backend.registry, backend.engine.base_fingerprint)
        tasks = gr.Dropdown(choices=task_choices(backend.registry, backend.base_name, backend.engine.base_fingerprint))
        return [tasks, *[gr.Dropdown(choices=adapters)] * (len(pickers) - 1), gr.Column(visible=is_empty(backend))]

    at_last(events, on_open, None, [*pickers, first_minute])


def connect_side_by_side(chat: ChatTab, compared: CompareTab, task: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Take the chat's last question to the Compare tab, with who answered it and who is picked now, and ask there."""

    def on_beside(held: Any, picked: str) -> list[Any]:
        question, adapters = last_two(read_turns(held), picked)
        return [question, adapters, gr.Tabs(selected="compare")]

    taken = chat.beside.click(
        on_beside, [chat.turns, task], [compared.prompt, compared.picked, tabs], queue=False, show_progress="hidden"
    )
    compared.run_on(taken.success)


def build_masthead(backend: Backend) -> None:
    """Lay out the title, the base that every answer comes from, and the switch between light and dark."""
    about = f"{literal_markdown(backend.base_name)} · one base, many tasks"
    with gr.Row(elem_id="masthead"):
        gr.Markdown(f"# {TITLE}\n{about}", elem_id="wordmark")
        appearance = gr.Button("Light / dark", size="sm", elem_id="appearance", scale=0, min_width=0)
    appearance.click(None, js=_TOGGLE_APPEARANCE)
