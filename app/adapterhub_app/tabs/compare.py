"""The Compare tab: one prompt to several tasks in one mixed batch, and where their answers differ."""

import difflib
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.backend import Backend, PendingAnswer
from adapterhub_app.display.answers import Answer, AnswerSettings, grow_answer
from adapterhub_app.display.escape import in_template, literal_markdown, sentence
from adapterhub_app.display.task import BASE, Task, adapter_choices
from adapterhub_lite.errors import AdapterHubError

MOST_ADAPTERS = 4
# A word keeps the white space after it, so that different texts are not aligned by their spaces.
_WORDS = re.compile(r"\S+\s*|\s+")
# Below this similarity (0 to 1) a word-by-word diff is unreadable.
_LEAST_SIMILARITY = 0.3
COLUMNS = MOST_ADAPTERS + 1
# Runs in the page, because the server may be gone: Compare returns.
_SERVER_WENT_AWAY = '() => [{__type__: "update", visible: true}, {__type__: "update", visible: false}]'


def compare(
    backend: Backend, session: str, prompt: str, adapters: Sequence[str], settings: AnswerSettings
) -> Iterator[list[Answer]]:
    """Yield the answers of the base and then of each adapter as they grow together; the last list is complete.

    A task that cannot answer shows the error in its place, and the others continue. Closing the iterator cancels all.
    """
    tasks = [BASE, *adapters][: MOST_ADAPTERS + 1]
    answers = [Answer() for _ in tasks]
    updates: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
    key = live_key(session)
    pending = [PendingAnswer() for _ in tasks]

    def follow(place: int, text: str) -> None:
        try:
            messages = [{"role": "user", "content": prompt}]
            for answer in grow_answer(backend, key, Task.parse(text), messages, settings, pending[place]):
                updates.put((place, answer))
        except AdapterHubError as error:
            updates.put((place, Answer(notice=sentence(error))))

    with ExitStack() as watched:
        for one in pending:
            watched.enter_context(backend.live.watch(key, one))
        for place, text in enumerate(tasks):
            threading.Thread(target=follow, args=(place, text), name=f"compare-{place}", daemon=True).start()
        while not all(answer.is_complete for answer in answers):
            place, answer = updates.get()
            answers[place] = answer
            while not updates.empty():  # one redraw of the page shows everything that has arrived
                place, answer = updates.get()
                answers[place] = answer
            yield list(answers)


def live_key(session: str) -> str:
    """The key of a session's comparison among the live answers, so that Stop here leaves the chat alone."""
    return f"{session}/compare"


def diff_words(reference: str, other: str) -> list[tuple[str, str | None]]:
    """`other` against `reference`, word by word: (text, "added" | "removed" | None for what both have)."""
    before, after = _WORDS.findall(reference), _WORDS.findall(other)
    pieces: list[tuple[str, str | None]] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("".join(before[i1:i2]), None))
            continue
        if i2 > i1:
            pieces.append(("".join(before[i1:i2]), "removed"))
        if j2 > j1:
            pieces.append(("".join(after[j1:j2]), "added"))
    return pieces


def nearest(earlier: Sequence[str], text: str) -> int | None:
    """The index in `earlier` of the answer to mark `text` against: the first if similar enough, else the most similar.

    None if it resembles none of them: then nothing is marked.
    """
    words = _WORDS.findall(text)
    similarity = [difflib.SequenceMatcher(a=_WORDS.findall(one), b=words, autojunk=False).ratio() for one in earlier]
    if similarity and similarity[0] >= _LEAST_SIMILARITY:
        return 0
    best = max(range(len(earlier)), key=similarity.__getitem__, default=None)
    return best if best is not None and similarity[best] >= _LEAST_SIMILARITY else None


def draw_diff(names: Sequence[str], texts: Sequence[str]) -> str:
    """The last of `texts` marked against an earlier one, as HTML; `ins`, `del` and `span` are the only markup inside."""
    place = nearest(texts[:-1], texts[-1])
    if place is None:
        return '<p class="diff-title">Too different from the other answers to mark words</p>'
    if texts[place] == texts[-1]:
        return f'<p class="diff-title">The same answer as {in_template(names[place])}</p>'
    tags = {"added": "ins", "removed": "del", None: "span"}
    marked = "".join(
        f"<{tags[kind]}>{in_template(text)}</{tags[kind]}>" for text, kind in diff_words(texts[place], texts[-1])
    )
    return f'<p class="diff-title">Against {in_template(names[place])}</p><div class="diff-text">{marked}</div>'


@dataclass(frozen=True)
class CompareTab:
    """The parts that the page connects to others: what is asked, and of whom."""

    prompt: gr.Textbox
    picked: gr.Dropdown
    run_on: Callable[[Any], None]


def build_compare_tab(backend: Backend) -> CompareTab:
    """Lay out the tab and connect it; `run_on` of the result makes it compare on another event too."""
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
                choices=adapter_choices(backend.registry, backend.engine.base_fingerprint), multiselect=True, max_choices=MOST_ADAPTERS,
                label=f"Up to {MOST_ADAPTERS} adapters", elem_id="compare-adapters",
            )  # fmt: skip
            length = gr.Slider(8, 256, value=64, step=8, label="Maximum answer length, tokens")
    notice = gr.Markdown(visible=False, elem_classes="notice", elem_id="compare-notice")
    gr.Markdown(
        "The base and every adapter answer in one batch, side by side. Differences are marked against "
        "the base or, if that is too different, against the most similar answer before it.",
        elem_classes="told",
    )
    columns = build_answer_columns()
    outputs = [notice, run, stop, *(part for column in columns for part in column)]

    def on_run(text: str, adapters: list[str], tokens: float, request: gr.Request) -> Iterator[list[Any]]:
        yield from snapshots(backend, str(request.session_hash), text, adapters or [], AnswerSettings(int(tokens)))

    def on_stop(request: gr.Request) -> None:
        backend.live.stop(live_key(str(request.session_hash)))

    def run_on(event: Any) -> None:
        running = event(on_run, [prompt, picked, length], outputs, trigger_mode="once", show_progress="hidden")
        running.failure(None, None, [run, stop], js=_SERVER_WENT_AWAY)

    run_on(partial(gr.on, [run.click, prompt.submit]))
    stop.click(on_stop, queue=False)
    return CompareTab(prompt, picked, run_on)


def build_answer_columns() -> list[list[Any]]:
    """Lay out (column, heading, answer, receipt, differences) for the maximum number of tasks, hidden until used."""
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


def snapshots(
    backend: Backend, session: str, prompt: str, adapters: Sequence[str], settings: AnswerSettings
) -> Iterator[list[Any]]:
    """Yield a comparison as updates of (notice, run, stop, the five parts of each column)."""
    if not prompt.strip():
        words = "There is no prompt yet. Write one, then compare."
        yield [gr.Markdown(literal_markdown(words), visible=True), *[gr.skip()] * (2 + 5 * COLUMNS)]
        return
    names = [displayed_name(text) for text in [BASE, *adapters][:COLUMNS]]
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
        if fresh:
            updates.append(gr.HTML("", visible=False))
        elif done and place > 0:
            texts = [one.text for one in answers[: place + 1]]
            updates.append(gr.HTML(draw_diff(names[: place + 1], texts), visible=True))
        else:
            updates.append(gr.skip())
    return updates


def displayed_name(text: str) -> str:
    """The name of a task as the other tabs show it; the text itself if it is not a task."""
    try:
        return Task.parse(text).name
    except AdapterHubError:
        return text
