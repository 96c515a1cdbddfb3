"""The page: a masthead and one tab for each thing to do. Lays out; each tab's module wires itself."""

import os
from typing import Any

import gradio as gr

from adapterhub_app.access import Access
from adapterhub_app.backend import Backend
from adapterhub_app.display.escape import literal_markdown
from adapterhub_app.display.task import BASE, adapter_choices, short_digest, task_choices
from adapterhub_app.tabs.blend_tab import build_blend_tab
from adapterhub_app.tabs.catalogue import catalogue_rows, version_choices
from adapterhub_app.tabs.chat_tab import build_chat_tab
from adapterhub_app.tabs.compare_tab import build_compare_tab
from adapterhub_app.tabs.plan_tab import build_plan_tab
from adapterhub_app.tabs.registry_tab import build_registry_tab
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine

TITLE = "adapterhub-lite"
# The browser keeps which appearance somebody likes; the server never learns of it.
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

    `base_name` is what people call the engine's base (None: the short form of its fingerprint), `base` its files
    where saved blends of a base given by folder are wanted. `access` None means no login, and everybody may write.
    `hub` is the endpoint to push to and pull from; None for the one `huggingface_hub` is set to.
    """
    named = base_name or f"base {engine.base_fingerprint[:8]}"
    backend = Backend(engine, registry, named, base=base, hub=hub, access=access or Access())
    # After every event Gradio sums up all events so far, in pandas: seconds of work on a page that is used for long.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as demo:
        _build_masthead(backend)
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

        def on_registry() -> list[Any]:
            return [catalogue_rows(registry), gr.Dropdown(choices=version_choices(registry))]

        pickers = [task, compared, *blended]
        gr.on([demo.load, tabs.change], on_open, None, pickers, queue=False, show_progress="hidden")
        gr.on(
            [demo.load, registry_tab.select], on_registry, None, [table, versions], queue=False, show_progress="hidden"
        )
        demo.load(None, js=_KEPT_APPEARANCE)
        demo.unload(_leaver(backend))
    return demo


def _build_masthead(backend: Backend) -> None:
    with gr.Row(elem_id="masthead"):
        gr.Markdown(f"# {TITLE}\n{_about(backend)}", elem_id="wordmark")
        appearance = gr.Button("Light / dark", size="sm", elem_id="appearance", scale=0, min_width=0)
    appearance.click(None, js=_TOGGLE_APPEARANCE)


def _about(backend: Backend) -> str:
    """The line under the title: which base every answer on the page comes from."""
    fingerprint = short_digest(backend.engine.base_fingerprint)
    named = "" if fingerprint in backend.base_name else f" · fingerprint {fingerprint}"
    return f"{literal_markdown(backend.base_name)}{named} · one base, many tasks"


def _leaver(backend: Backend) -> Any:
    def on_leave(request: gr.Request) -> None:
        backend.live.stop_all(str(request.session_hash))

    return on_leave
