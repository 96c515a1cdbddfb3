"""The Blend tab: adapters and weights in; a live answer, a task for the chat, or a saved merge out."""

from collections.abc import Iterator, Sequence
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.answers import AnswerSettings, grow_answer
from adapterhub_app.display.escape import literal_markdown, sentence
from adapterhub_app.display.task import Task, adapter_choices, short_digest
from adapterhub_lite.errors import UsageError
from adapterhub_lite.merging import merge_adapters
from adapterhub_lite.registry import AdapterReference

MOST_PARTS = 3
METHODS = {
    "cat · exact, rank is the sum": "cat",
    "svd · best at a rank of your choice": "svd",
    "ties · keeps the strongest changes": "ties",
    "dare_ties · random drop, then ties": "dare_ties",
}


def blend_of(picked: Sequence[str | None], weights: Sequence[float]) -> Task:
    """The blend of the picked adapters, each at its weight; empty pickers and weights of 0 are left out.

    Raises:
        UsageError: nothing is left to blend.
        ReferenceSyntaxError: a picked text is not an adapter reference.
    """
    parts = [
        (str(AdapterReference.parse(reference)), round(float(weight), 2))
        for reference, weight in zip(picked, weights, strict=True)
        if reference
    ]
    parts = [(reference, weight) for reference, weight in parts if weight != 0.0]
    if not parts:
        raise UsageError("There is nothing to blend yet. Pick adapters and give at least one a weight other than 0.")
    return Task(tuple(parts))


def save_blend(backend: Backend, user: str | None, blend: Task, name: str, method: str, rank: int | None) -> list[str]:
    """Save a blend as the next version of `name`; returns its receipt as plain lines.

    `rank` None leaves the rank to the method.

    Raises:
        UsageError: the person is not an admin, or gave no name.
        MergeError: as `merge_adapters` does.
    """
    backend.access.require_admin(user, "save a blend")
    if not name.strip():
        raise UsageError("The merged adapter needs a name, such as sql-event.")
    references = [backend.registry.resolve(reference).reference for reference, _ in blend.parts]
    merged = merge_adapters(
        references,
        [weight for _, weight in blend.parts],
        method,  # type: ignore[arg-type]  # one of METHODS; merge_adapters refuses others
        rank=rank,
        name=name.strip(),
        registry=backend.registry,
        base=backend.base,
    )
    manifest = merged.manifest
    parents = " + ".join(f"{p.weight:g} × {p.reference} ({short_digest(p.digest)})" for p in manifest.parents)
    return [
        f"Saved as {manifest.reference}, digest {short_digest(manifest.digest)}, rank {manifest.lora.rank}.",
        f"Parents: {parents}.",
        f"Measured error against the exact weighted sum: {merged.relative_error:.2g}.",
    ]


def blend_key(session: str) -> str:
    """The key of a session's blend among the live answers, so that stopping it leaves the chat alone."""
    return f"{session}/blend"


def build_blend_tab(backend: Backend, task: gr.Dropdown, tabs: gr.Tabs) -> list[gr.Dropdown]:
    """Lay out the tab and connect it to the Chat tab's `task`; returns its adapter pickers, to refresh their choices."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            pickers, weights = build_part_rows(backend)
            gr.Markdown("The adapters' changes add up on the frozen base, each times its weight.", elem_classes="told")
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="blend-prompt",
                                placeholder="Moving a weight asks again")  # fmt: skip
            answer = gr.Textbox(label="Answer", lines=6, max_lines=20, interactive=False, elem_id="blend-answer")
            receipt = gr.Markdown(elem_classes="quiet", elem_id="blend-receipt")
            with gr.Row(elem_classes="natural"):
                run = gr.Button("Answer", variant="primary", elem_id="blend-run")
                chat = gr.Button("Use in chat", elem_id="blend-chat")
            length = gr.Slider(8, 256, value=64, step=8, label="Maximum answer length, tokens")
    parts = [*pickers, *weights]
    build_saving(backend, parts)

    def on_answer(
        text: str, tokens: float, a: Any, b: Any, c: Any, u: float, v: float, w: float, request: gr.Request
    ) -> Iterator[tuple[Any, Any]]:
        try:
            blend = blend_of((a, b, c), (u, v, w))
        except Exception as error:  # the boundary to the page
            yield gr.skip(), literal_markdown(sentence(error))
            return
        if not text.strip():
            yield gr.skip(), literal_markdown("There is no prompt yet. Write one to try the blend.")
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
        except Exception as error:  # the boundary to the page
            return gr.skip(), gr.skip(), literal_markdown(sentence(error))
        return gr.Dropdown(value=str(blend)), gr.Tabs(selected="chat"), gr.skip()

    again = [run.click, prompt.submit, *(weight.input for weight in weights), *(picker.input for picker in pickers)]
    # The answer with the old weights is cancelled at once; then the latest change is answered.
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


def build_part_rows(backend: Backend) -> tuple[list[gr.Dropdown], list[gr.Slider]]:
    """Lay out an adapter picker and a weight for each part of a blend."""
    pickers, weights = [], []
    choices = adapter_choices(backend.registry, backend.engine.base_fingerprint)
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


def build_saving(backend: Backend, parts: list[Any]) -> None:
    """Lay out and connect the form that saves the blend as a merged adapter."""
    with gr.Accordion("Save as a merged adapter", open=False, elem_id="blend-saving"):
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="Name", placeholder="sql-event", elem_id="blend-name", max_length=64)
            method = gr.Dropdown(choices=list(METHODS.items()), value="cat", label="Method", elem_id="blend-method")
            rank = gr.Number(label="Rank (0: chosen by the method)", value=0, precision=0, minimum=0, maximum=256)
        with gr.Row(elem_classes="natural"):
            save = gr.Button("Save", elem_id="blend-save")
        saved = gr.Markdown(elem_classes="notice", elem_id="blend-saved", visible=False)

    def on_save(
        a: Any, b: Any, c: Any, u: float, v: float, w: float, called: str, how: str, wide: float, request: gr.Request
    ) -> Any:
        try:
            blend = blend_of((a, b, c), (u, v, w))
            lines = save_blend(backend, request.username, blend, called, how, int(wide or 0) or None)
        except Exception as error:  # the boundary to the page
            lines = [sentence(error)]
        return gr.Markdown("\n\n".join(literal_markdown(line) for line in lines), visible=True)

    save.click(on_save, [*parts, name, method, rank], saved, trigger_mode="once", show_progress_on=saved)
