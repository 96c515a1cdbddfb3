"""The Compare tab's components and what they are wired to. The work is done in compare.py."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.answers import Answer, AnswerSettings
from adapterhub_app.display.escape import literal_markdown
from adapterhub_app.display.task import BASE, Task, adapter_choices
from adapterhub_app.tabs.compare import MOST_ADAPTERS, compare, draw_diff, live_key
from adapterhub_lite.errors import AdapterHubError

COLUMNS = MOST_ADAPTERS + 1
# Runs in the page, because there may be no server: one can run again.
_SERVER_WENT_AWAY = '() => [{__type__: "update", visible: true}, {__type__: "update", visible: false}]'


def build_compare_tab(backend: Backend) -> gr.Dropdown:
    """Lay out the tab and wire it; returns its adapter picker, so that the page can refresh the choices."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=6, placeholder="One prompt for all of them", elem_id="compare-prompt"
            )
            with gr.Row(elem_classes="natural"):
                run = gr.Button("Compare", variant="primary", elem_id="compare-run")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="compare-stop")
        with gr.Column(scale=1, min_width=260):
            picked = gr.Dropdown(
                choices=adapter_choices(backend.registry), multiselect=True, max_choices=MOST_ADAPTERS,
                label=f"Up to {MOST_ADAPTERS} adapters", elem_id="compare-adapters",
            )  # fmt: skip
            length = gr.Slider(8, 256, value=64, step=8, label="Longest answer, tokens")
    notice = gr.Markdown(visible=False, elem_classes="notice", elem_id="compare-notice")
    gr.Markdown(
        "The base and every adapter answer in one batch, side by side. What differs is marked, against "
        "the base or, where that is too unlike, the likest answer before it.",
        elem_classes="quiet",
    )
    columns = _answer_columns()
    outputs = [notice, run, stop, *(part for column in columns for part in column)]

    def on_run(text: str, adapters: list[str], tokens: float, request: gr.Request) -> Iterator[list[Any]]:
        yield from _updates(backend, str(request.session_hash), text, adapters or [], AnswerSettings(int(tokens)))

    def on_stop(request: gr.Request) -> None:
        backend.live.stop(live_key(str(request.session_hash)))

    running = gr.on(
        [run.click, prompt.submit],
        on_run,
        [prompt, picked, length],
        outputs,
        trigger_mode="once",
        show_progress="hidden",
    )
    running.failure(None, None, [run, stop], js=_SERVER_WENT_AWAY)
    stop.click(on_stop, queue=False)
    return picked


def _answer_columns() -> list[list[Any]]:
    """One (column, heading, answer, receipt, differences) for each task there can be; hidden until used."""
    columns = []
    with gr.Row(equal_height=False, elem_id="compare-answers"):
        for place in range(COLUMNS):
            with gr.Column(min_width=210, visible=False, elem_classes="answer-card") as column:
                heading = gr.Markdown(elem_classes="card-heading")
                answer = gr.Textbox(
                    show_label=False, label=f"Answer {place + 1}", container=False, lines=5, max_lines=24,
                    interactive=False, elem_classes="plain-answer",
                )  # fmt: skip
                receipt = gr.Markdown(elem_classes="quiet")
                difference = gr.HTML(visible=False, padding=False, elem_classes="difference")
                columns.append([column, heading, answer, receipt, difference])
    return columns


def _updates(
    backend: Backend, session: str, prompt: str, adapters: Sequence[str], settings: AnswerSettings
) -> Iterator[list[Any]]:
    """Snapshots of a comparison as updates of (notice, run, stop, each column's five parts)."""
    if not prompt.strip():
        words = "There is no prompt yet. Write one, then compare."
        yield [gr.Markdown(literal_markdown(words), visible=True), *[gr.skip()] * (2 + 5 * COLUMNS)]
        return
    names = [_name(text) for text in [BASE, *adapters][:COLUMNS]]
    going = [gr.Markdown("", visible=False), gr.Button(visible=False), gr.Button(visible=True)]
    yield [*going, *_columns(names, [Answer() for _ in names], fresh=True)]
    answers: list[Answer] = []
    for answers in compare(backend, session, prompt, adapters, settings):
        yield [gr.skip(), gr.skip(), gr.skip(), *_columns(names, answers, fresh=False)]
    yield [
        gr.skip(),
        gr.Button(visible=True),
        gr.Button(visible=False),
        *_columns(names, answers, fresh=False, done=True),
    ]


def _columns(names: Sequence[str], answers: Sequence[Answer], *, fresh: bool, done: bool = False) -> list[Any]:
    updates: list[Any] = []
    for place in range(COLUMNS):
        if place >= len(names):
            updates += [gr.Column(visible=False), *[gr.skip()] * 4] if fresh else [gr.skip()] * 5
            continue
        answer = answers[place]
        heading = gr.Markdown(literal_markdown(names[place])) if fresh else gr.skip()
        line = answer.receipt.line("") if answer.receipt else ""
        words = literal_markdown(" · ".join(part for part in (line, answer.notice) if part) or "…")
        updates += [gr.Column(visible=True) if fresh else gr.skip(), heading, answer.text, words]
        updates.append(_difference(names, answers, place, fresh=fresh, done=done))
    return updates


def _difference(names: Sequence[str], answers: Sequence[Answer], place: int, *, fresh: bool, done: bool) -> Any:
    if fresh or place == 0:
        return gr.HTML("", visible=False) if fresh else gr.skip()
    if not done:
        return gr.skip()
    return gr.HTML(draw_diff(names[: place + 1], [answer.text for answer in answers[: place + 1]]), visible=True)


def _name(text: str) -> str:
    try:
        return Task.parse(text).name
    except AdapterHubError:
        return text
