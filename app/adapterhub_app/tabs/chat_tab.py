"""The Chat tab's components and what they are wired to. The work is done in chat.py."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.answers import AnswerSettings
from adapterhub_app.display.escape import literal_markdown
from adapterhub_app.display.notice import sentence
from adapterhub_app.display.task import describe_task, task_examples
from adapterhub_app.display.transcript import (
    INTERRUPTED,
    IS_ANSWERING,
    Turn,
    chat_bubbles,
    close_open_turns,
    read_turns,
    write_turns,
)
from adapterhub_app.tabs.chat import ask, retry
from adapterhub_lite.errors import AdapterHubError

WELCOME = (
    "### Ask, then switch\nThe base stays in memory and a task is a small adapter on it: change it in mid-conversation, "
    "and each answer says who gave it."
)

# Gradio reloads the page when the server was restarted: the browser's tab keeps what has to outlive that. A page that
# has just been opened is empty and keeps nothing.
_KEEP = """(turns, task, owner) => {
  if (turns?.length) sessionStorage.setItem("conversation", JSON.stringify([turns, task, owner]))
}"""
_FORGET = """() => { sessionStorage.removeItem("conversation") }"""
_BRING_BACK = (
    """(turns, task, owner) => JSON.parse(sessionStorage.getItem("conversation") ?? "null") ?? [turns, task, owner]"""
)
# Runs in the page, because there may be no server: the answer under way ends where it is, and one can ask again.
_SERVER_WENT_AWAY = f"""bubbles => [
  bubbles.map(bubble => bubble.metadata?.status !== "pending" ? bubble : {{...bubble, metadata: {{
    ...bubble.metadata, status: "done", title: bubble.metadata.title.replace("{IS_ANSWERING}", " · {INTERRUPTED}")
  }}}}),
  {{__type__: "update", visible: true}}, {{__type__: "update", visible: false}},
]"""


def build_chat_tab(backend: Backend, task: gr.Dropdown, opened: Any) -> None:
    """Lay out the tab around the task picker and wire it; `opened` is the event of a page that was opened."""
    # The conversation lives in the page (see transcript.py); this carries it to and fro and shows nothing.
    turns = gr.JSON(value=[], visible=False)
    with gr.Row(equal_height=False, elem_id="chat"):
        with gr.Column(scale=1, min_width=260, elem_id="chat-side"):
            task.render()
            about = gr.Markdown(elem_id="task-about", elem_classes="quiet")
            examples = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[], label="Examples", elem_id="examples", visible=False
            )
            settings = _settings()
        with gr.Column(scale=3, min_width=320):
            chatbot = gr.Chatbot(
                elem_id="transcript", show_label=False, height="min(62vh, 620px)", render_markdown=False,
                allow_tags=False, latex_delimiters=[], buttons=[], placeholder=WELCOME,
            )  # fmt: skip
            question, send, stop = _question_row()
            with gr.Row(elem_classes="natural"):
                again = gr.Button("Retry", size="sm", elem_id="retry")
                clear = gr.Button("New conversation", size="sm", elem_id="clear")

    outputs = [chatbot, turns, question, send, stop]

    def on_ask(
        picked: str, text: str, held: Any, tokens: float, warmth: float, earlier: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        session, how = str(request.session_hash), AnswerSettings(int(tokens), float(warmth))
        yield from _updates(held, lambda turns: ask(backend, session, picked, text, turns, how, remember=earlier))

    def on_retry(
        picked: str, held: Any, tokens: float, warmth: float, earlier: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        session, how = str(request.session_hash), AnswerSettings(int(tokens), float(warmth))
        yield from _updates(held, lambda turns: retry(backend, session, picked, turns, how, remember=earlier))

    def on_stop(request: gr.Request) -> None:
        backend.live.stop(str(request.session_hash))

    asked = gr.on(
        [question.submit, send.click],
        on_ask,
        [task, question, turns, *settings],
        outputs,
        trigger_mode="once",
        show_progress="hidden",
    )
    retried = again.click(on_retry, [task, turns, *settings], outputs, trigger_mode="once", show_progress="hidden")
    held = _outlive_restarts(chatbot, turns, task, opened)
    for answering in (asked, retried):
        answering.failure(None, chatbot, [chatbot, send, stop], js=_SERVER_WENT_AWAY, show_progress="hidden")
        answering.then(None, held, None, js=_KEEP, show_progress="hidden")
    stop.click(on_stop, queue=False)
    clear.click(lambda: ([], [], ""), None, [chatbot, turns, question], queue=False)
    clear.click(None, js=_FORGET)
    task.change(lambda picked: _told(backend, picked), task, [about, examples], queue=False, show_progress="hidden")
    examples.click(lambda row: row[0], examples, question, queue=False, show_progress="hidden")


def _told(backend: Backend, picked: str) -> tuple[str, gr.Dataset]:
    """The line about a task, and its examples."""
    samples = [[example] for example in task_examples(picked, backend.registry)]
    about = literal_markdown(describe_task(picked, backend.registry))
    return about, gr.Dataset(samples=samples, visible=bool(samples))


def _outlive_restarts(chatbot: gr.Chatbot, turns: gr.JSON, task: gr.Dropdown, opened: Any) -> list[Any]:
    """Keep the conversation in the browser's tab, and show it again to the same person when the page is loaded anew.

    Returns what `_KEEP` takes. A change of the transcript keeps an answer's beginning; its end comes with the turns.
    """
    owner = gr.JSON(value=None, visible=False)

    def on_open(held: Any, picked: str, kept_by: Any, request: gr.Request) -> tuple[Any, Any, Any, Any]:
        try:
            conversation = close_open_turns(read_turns(held)) if kept_by == request.username else []
        except AdapterHubError:  # of an older version of the page
            conversation = []
        again = gr.Dropdown(value=picked) if conversation else gr.skip()
        return chat_bubbles(conversation), write_turns(conversation), again, request.username

    held = [turns, task, owner]
    gr.on([opened], on_open, held, [chatbot, *held], js=_BRING_BACK, queue=False, show_progress="hidden")
    chatbot.change(None, held, None, js=_KEEP, show_progress="hidden")
    return held


def _settings() -> list[Any]:
    """Longest answer, temperature, and whether earlier turns are sent along."""
    with gr.Accordion("Settings", open=False):
        return [
            gr.Slider(8, 512, value=128, step=8, label="Longest answer, tokens"),
            gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0 always picks the likeliest)"),
            gr.Checkbox(value=True, label="Send the task's own earlier turns along"),
        ]


def _question_row() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """The message, with its Send and its Stop, of which one is shown."""
    with gr.Row(elem_id="ask"):
        question = gr.Textbox(
            show_label=False, label="Your message", placeholder="Message; Enter sends", lines=1,
            max_lines=6, scale=8, container=False, autofocus=True, elem_id="question",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop", visible=False)
    return question, send, stop


def _updates(held: Any, answering: Callable[[list[Turn]], Iterator[list[Turn]]]) -> Iterator[tuple[Any, ...]]:
    """Turn snapshots of a conversation into updates of (chatbot, turns, question, send, stop)."""
    snapshot: list[Turn] = []
    try:
        for number, snapshot in enumerate(answering(read_turns(held))):
            bubbles = chat_bubbles(snapshot)
            if number == 0:
                yield bubbles, write_turns(snapshot), "", gr.Button(visible=False), gr.Button(visible=True)
            else:
                yield bubbles, gr.skip(), gr.skip(), gr.skip(), gr.skip()
    except Exception as error:  # a page that holds no readable conversation; the answer's own errors are turns
        snapshot = [Turn(role="assistant", text="", by="app", notice=sentence(error))]
    yield chat_bubbles(snapshot), write_turns(snapshot), gr.skip(), gr.Button(visible=True), gr.Button(visible=False)
