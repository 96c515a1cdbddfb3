"""The Blend tab's components and what they are wired to. The work is done in blend.py and answers.py."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.answers import AnswerSettings, grow_answer
from adapterhub_app.display.escape import literal_markdown
from adapterhub_app.display.notice import sentence
from adapterhub_app.display.task import adapter_choices
from adapterhub_app.tabs.blend import METHODS, MOST_PARTS, blend_key, blend_of, save_blend


def build_blend_tab(backend: Backend, task: gr.Dropdown, tabs: gr.Tabs) -> list[gr.Dropdown]:
    """Lay out the tab and wire it to the Chat tab's `task`; returns its adapter pickers, to refresh their choices."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            pickers, weights = _part_rows(backend)
            gr.Markdown("The adapters' changes add up on the frozen base, each times its weight.", elem_classes="quiet")
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="blend-prompt",
                                placeholder="Moving a weight answers it again")  # fmt: skip
            answer = gr.Textbox(label="Answer", lines=6, max_lines=20, interactive=False, elem_id="blend-answer")
            receipt = gr.Markdown(elem_classes="quiet", elem_id="blend-receipt")
            with gr.Row(elem_classes="natural"):
                run = gr.Button("Answer", variant="primary", elem_id="blend-run")
                chat = gr.Button("Use in chat", elem_id="blend-chat")
            length = gr.Slider(8, 256, value=64, step=8, label="Longest answer, tokens")
    parts = [*pickers, *weights]
    _build_saving(backend, parts)

    def on_answer(
        text: str, tokens: float, a: Any, b: Any, c: Any, u: float, v: float, w: float, request: gr.Request
    ) -> Iterator[tuple[Any, Any]]:
        try:
            blend = blend_of((a, b, c), (u, v, w))
        except Exception as error:  # the page's edge
            yield gr.skip(), literal_markdown(sentence(error))
            return
        if not text.strip():
            yield gr.skip(), literal_markdown("There is no prompt yet. Write one to hear the blend.")
            return
        messages = [{"role": "user", "content": text}]
        session = blend_key(str(request.session_hash))
        for growing in grow_answer(backend, session, blend, messages, AnswerSettings(int(tokens))):
            line = (
                growing.receipt.line(blend.name) if growing.receipt else growing.notice or f"{blend.name} is answering"
            )
            yield growing.text, literal_markdown(line)

    def on_change(request: gr.Request) -> None:
        backend.live.stop(blend_key(str(request.session_hash)))

    def on_chat(a: Any, b: Any, c: Any, u: float, v: float, w: float) -> tuple[Any, Any, Any]:
        try:
            blend = blend_of((a, b, c), (u, v, w))
        except Exception as error:  # the page's edge
            return gr.skip(), gr.skip(), literal_markdown(sentence(error))
        return gr.Dropdown(value=str(blend)), gr.Tabs(selected="chat"), gr.skip()

    again = [run.click, prompt.submit, *(weight.input for weight in weights), *(picker.input for picker in pickers)]
    # What is being answered with the old weights ends at once; the last change made meanwhile is then answered.
    gr.on(again, on_change, None, None, queue=False, show_progress="hidden")
    gr.on(
        again,
        on_answer,
        [prompt, length, *parts],
        [answer, receipt],
        trigger_mode="always_last",
        show_progress="hidden",
    )
    chat.click(on_chat, parts, [task, tabs, receipt], queue=False, show_progress="hidden")
    return pickers


def _part_rows(backend: Backend) -> tuple[list[gr.Dropdown], list[gr.Slider]]:
    pickers, weights = [], []
    choices = adapter_choices(backend.registry)
    for place in range(1, MOST_PARTS + 1):
        needed = place < MOST_PARTS
        label = f"Adapter {place}" + ("" if needed else ", optional")
        with gr.Group(elem_classes="blend-part"):
            picker = gr.Dropdown(
                choices=choices, value=None, allow_custom_value=True, label=label, elem_id=f"blend-adapter-{place}"
            )
            weight = gr.Slider(
                -1, 2, value=0.5 if needed else 0, step=0.05, label="Weight", elem_id=f"blend-weight-{place}"
            )
        pickers.append(picker)
        weights.append(weight)
    return pickers, weights


def _build_saving(backend: Backend, parts: list[Any]) -> None:
    with gr.Accordion("Save as a merged adapter", open=False, elem_id="blend-saving"):
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="Name", placeholder="sql-event", elem_id="blend-name", max_length=64)
            method = gr.Dropdown(choices=list(METHODS.items()), value="cat", label="Method", elem_id="blend-method")
            rank = gr.Number(label="Rank, 0 for the method's own", value=0, precision=0, minimum=0, maximum=256)
        with gr.Row(elem_classes="natural"):
            save = gr.Button("Save", elem_id="blend-save")
        saved = gr.Markdown(elem_classes="notice", elem_id="blend-saved", visible=False)

    def on_save(
        a: Any, b: Any, c: Any, u: float, v: float, w: float, called: str, how: str, wide: float, request: gr.Request
    ) -> Any:
        try:
            blend = blend_of((a, b, c), (u, v, w))
            lines = save_blend(backend, request.username, blend, called, how, int(wide or 0) or None)
        except Exception as error:  # the page's edge
            lines = [sentence(error)]
        return gr.Markdown("\n\n".join(literal_markdown(line) for line in lines), visible=True)

    save.click(on_save, [*parts, name, method, rank], saved, trigger_mode="once", show_progress_on=saved)
