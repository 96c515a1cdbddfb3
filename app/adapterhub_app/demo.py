"""The page: a masthead and one tab for each activity. Only the layout; each tab connects its own events."""

import os
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.access import Access
from adapterhub_app.backend import Backend
from adapterhub_app.display.escape import literal_markdown
from adapterhub_app.display.task import BASE, adapter_choices, short_digest, task_choices
from adapterhub_app.tabs.blend import build_blend_tab
from adapterhub_app.tabs.catalogue import catalogue_rows, version_choices
from adapterhub_app.tabs.chat import build_chat_tab
from adapterhub_app.tabs.compare import build_compare_tab
from adapterhub_app.tabs.plan import build_plan_tab
from adapterhub_app.tabs.registry import build_registry_tab
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine

TITLE = "adapterhub-lite"
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
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as demo:
        build_masthead(backend)
        task = gr.Dropdown(
            choices=task_choices(registry, named), value=BASE, label="Task", allow_custom_value=True, render=False,
            elem_id="task", info="The base, an adapter, or any reference such as sql:2",
        )  # fmt: skip
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Chat", id="chat"):
                build_chat_tab(backend, task, demo.load)
            with gr.Tab("Compare", id="compare"):
                compared = build_compare_tab(backend)
            with gr.Tab("Blend", id="blend"):
                blended = build_blend_tab(backend, task, tabs)
            with gr.Tab("Registry", id="registry") as registry_tab:
                table, versions = build_registry_tab(backend, task, tabs)
            with gr.Tab("Plan", id="plan"):
                build_plan_tab(backend)

        def on_open() -> list[Any]:
            adapters = adapter_choices(registry)
            return [gr.Dropdown(choices=task_choices(registry, named)), *[gr.Dropdown(choices=adapters)] * 4]

        def on_leave(request: gr.Request) -> None:
            backend.live.stop_all(str(request.session_hash))

        def on_registry() -> list[Any]:
            return [catalogue_rows(registry), gr.Dropdown(choices=version_choices(registry))]

        pickers = [task, compared, *blended]
        gr.on([demo.load, tabs.change], on_open, None, pickers, queue=False, show_progress="hidden")
        gr.on(
            [demo.load, registry_tab.select], on_registry, None, [table, versions], queue=False, show_progress="hidden"
        )
        demo.load(None, js=_KEPT_APPEARANCE)
        demo.unload(on_leave)
    return demo


def build_masthead(backend: Backend) -> None:
    """Lay out the title, the base that every answer comes from, and the switch between light and dark."""
    fingerprint = short_digest(backend.engine.base_fingerprint)
    detail = "" if fingerprint in backend.base_name else f" · fingerprint {fingerprint}"
    about = f"{literal_markdown(backend.base_name)}{detail} · one base, many tasks"
    with gr.Row(elem_id="masthead"):
        gr.Markdown(f"# {TITLE}\n{about}", elem_id="wordmark")
        appearance = gr.Button("Light / dark", size="sm", elem_id="appearance", scale=0, min_width=0)
    appearance.click(None, js=_TOGGLE_APPEARANCE)
