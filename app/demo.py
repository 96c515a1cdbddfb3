"""The page: a masthead and one tab for each thing to do. Lays out; each tab's module wires itself."""

import os

import gradio as gr

from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from app.access import Access
from app.backend import Backend
from app.chat_tab import build_chat_tab
from app.escape import literal_markdown
from app.task import BASE, task_choices

TITLE = "adapterhub-lite"
# Only the page's own state changes: the server never learns which appearance somebody likes.
_TOGGLE_APPEARANCE = "() => { document.body.classList.toggle('dark') }"


def build_demo(
    engine: InferenceEngine, registry: AdapterRegistry, *, base_name: str | None = None, access: Access | None = None
) -> gr.Blocks:
    """Build the app's page over a running engine and a registry; see `launch` for serving it.

    `base_name` is what people call the engine's base (None: the short form of its fingerprint). `access` None means
    no login, and everybody may write.
    """
    backend = Backend(engine, registry, base_name or f"base {engine.base_fingerprint[:8]}", access or Access())

    def on_leave(request: gr.Request) -> None:
        backend.live.stop(str(request.session_hash))

    # After every event Gradio sums up all events so far, in pandas: seconds of work on a page that is used for long.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as demo:
        with gr.Row(elem_id="masthead"):
            gr.Markdown(f"# {TITLE}\n{literal_markdown(_strapline(backend))}", elem_id="wordmark")
            appearance = gr.Button("Light / dark", size="sm", elem_id="appearance", scale=0, min_width=0)
        task = gr.Dropdown(
            choices=task_choices(registry, backend.base_name), value=BASE, label="Task", allow_custom_value=True,
            render=False, elem_id="task", info="The base, an adapter, or any reference such as sql:2",
        )  # fmt: skip
        with gr.Tabs(elem_id="tabs"), gr.Tab("Chat", id="chat"):
            build_chat_tab(backend, task)
        appearance.click(None, js=_TOGGLE_APPEARANCE)
        demo.load(
            lambda: gr.Dropdown(choices=task_choices(registry, backend.base_name)), None, task, show_progress="hidden"
        )
        demo.unload(on_leave)
    return demo


def _strapline(backend: Backend) -> str:
    return f"{backend.base_name}, one base for every task"
