"""The Chat tab: a question in, a growing conversation out, kept in the browser's tab."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.answers import AnswerSettings, grow_answer
from adapterhub_app.display.escape import literal_markdown, one_line, sentence
from adapterhub_app.display.task import Task, describe_task, task_examples
from adapterhub_app.display.transcript import (
    INTERRUPTED,
    IS_ANSWERING,
    MAX_CHARACTERS,
    MAX_TURNS,
    Turn,
    chat_bubbles,
    close_open_turns,
    model_messages,
    read_turns,
    write_turns,
)
from adapterhub_lite.errors import AdapterHubError, UsageError

WELCOME = (
    "### Ask, then switch\nThe base stays in memory, and a task is a small adapter on it: change it in mid-conversation, "
    "and each answer says who gave it."
)

# Gradio reloads the page after a restart of the server, so the conversation is kept in the browser's session storage.
# A page that has just been opened is empty and stores nothing.
_KEEP = """(turns, task, owner) => {
  if (turns?.length) sessionStorage.setItem("conversation", JSON.stringify([turns, task, owner]))
}"""
_FORGET = """() => { sessionStorage.removeItem("conversation") }"""
_BRING_BACK = (
    """(turns, task, owner) => JSON.parse(sessionStorage.getItem("conversation") ?? "null") ?? [turns, task, owner]"""
)
# Runs in the page, because the server may be gone: the answer in progress is marked interrupted, and Send returns.
_SERVER_WENT_AWAY = f"""bubbles => [
  bubbles.map(bubble => bubble.metadata?.status !== "pending" ? bubble : {{...bubble, metadata: {{
    ...bubble.metadata, status: "done", title: bubble.metadata.title.replace("{IS_ANSWERING}", " · {INTERRUPTED}")
  }}}}),
  {{__type__: "update", visible: true}}, {{__type__: "update", visible: false}},
]"""


def ask(
    backend: Backend,
    session: str,
    task_text: str | None,
    question: str,
    turns: Sequence[Turn],
    settings: AnswerSettings,
    *,
    remember: bool = True,
) -> Iterator[list[Turn]]:
    """Yield the conversation with the question, then with the growing answer, finally with its receipt or a notice.

    `remember` includes the task's own earlier turns. Closing the iterator cancels the answer.
    """
    earlier = close_open_turns(turns)[2 - MAX_TURNS :]
    try:
        if not question.strip():
            raise UsageError("There is no question yet. Write one, or pick an example.")
        task = Task.parse(task_text)
    except AdapterHubError as error:
        asked = [Turn(role="user", text=question.strip()[:MAX_CHARACTERS])] if question.strip() else []
        who = one_line(task_text or "base", 80)
        yield [*earlier, *asked, Turn(role="assistant", text="", by=who, notice=sentence(error))]
        return
    conversation = [*earlier, Turn(role="user", text=question.strip()[:MAX_CHARACTERS])]
    reply = Turn(role="assistant", text="", by=task.name)
    yield [*conversation, reply]
    messages = model_messages(conversation, task.name, remember=remember)
    for answer in grow_answer(backend, session, task, messages, settings):
        parts = {"text": answer.text, "receipt": answer.receipt, "notice": answer.notice}
        yield [*conversation, reply.model_copy(update=parts)]


def retry(
    backend: Backend,
    session: str,
    task_text: str | None,
    turns: Sequence[Turn],
    settings: AnswerSettings,
    *,
    remember: bool = True,
) -> Iterator[list[Turn]]:
    """Ask the last question again, of the currently picked task; the new answer replaces the old one."""
    questions = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not questions:
        yield list(turns)
        return
    last = questions[-1]
    yield from ask(backend, session, task_text, turns[last].text, turns[:last], settings, remember=remember)


def build_chat_tab(backend: Backend, task: gr.Dropdown, opened: Any) -> None:
    """Lay out the tab around the task picker and connect it; `opened` is the event of a page being opened."""
    # The conversation lives in the page (see transcript.py); this invisible component carries it to and from the server.
    turns = gr.JSON(value=[], visible=False)
    with gr.Row(equal_height=False, elem_id="chat"):
        with gr.Column(scale=1, min_width=260, elem_id="chat-side"):
            task.render()
            about = gr.Markdown(elem_id="task-about", elem_classes="quiet")
            examples = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[], label="Examples", elem_id="examples", visible=False
            )
            settings = build_settings()
        with gr.Column(scale=3, min_width=320):
            chatbot = gr.Chatbot(
                elem_id="transcript", show_label=False, height="min(62vh, 620px)", render_markdown=False,
                allow_tags=False, latex_delimiters=[], buttons=[], placeholder=WELCOME,
            )  # fmt: skip
            question, send, stop = build_question_row()
            with gr.Row(elem_classes="natural"):
                again = gr.Button("Retry", size="sm", elem_id="retry")
                clear = gr.Button("New conversation", size="sm", elem_id="clear")

    outputs = [chatbot, turns, question, send, stop]

    def on_ask(
        picked: str, text: str, held: Any, tokens: float, heat: float, earlier: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        session, how = str(request.session_hash), AnswerSettings(int(tokens), float(heat))
        yield from _updates(held, lambda turns: ask(backend, session, picked, text, turns, how, remember=earlier))

    def on_retry(
        picked: str, held: Any, tokens: float, heat: float, earlier: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        session, how = str(request.session_hash), AnswerSettings(int(tokens), float(heat))
        yield from _updates(held, lambda turns: retry(backend, session, picked, turns, how, remember=earlier))

    def on_stop(request: gr.Request) -> None:
        backend.live.stop(str(request.session_hash))

    def on_task(picked: str) -> tuple[str, gr.Dataset]:
        samples = [[example] for example in task_examples(picked, backend.registry)]
        description = literal_markdown(describe_task(picked, backend.registry))
        return description, gr.Dataset(samples=samples, visible=bool(samples))

    asked = gr.on(
        [question.submit, send.click], on_ask, [task, question, turns, *settings], outputs, trigger_mode="once",
        show_progress="hidden",
    )  # fmt: skip
    retried = again.click(on_retry, [task, turns, *settings], outputs, trigger_mode="once", show_progress="hidden")
    kept = keep_conversation(chatbot, turns, task, opened)
    for answering in (asked, retried):
        answering.failure(None, chatbot, [chatbot, send, stop], js=_SERVER_WENT_AWAY, show_progress="hidden")
        answering.then(None, kept, None, js=_KEEP, show_progress="hidden")
    stop.click(on_stop, queue=False)
    clear.click(lambda: ([], [], ""), None, [chatbot, turns, question], queue=False)
    clear.click(None, js=_FORGET)
    task.change(on_task, task, [about, examples], queue=False, show_progress="hidden")
    examples.click(lambda row: row[0], examples, question, queue=False, show_progress="hidden")


def keep_conversation(chatbot: gr.Chatbot, turns: gr.JSON, task: gr.Dropdown, opened: Any) -> list[Any]:
    """Keep the conversation in the browser's tab, and restore it for the same person when the page is reloaded.

    Returns the inputs of `_KEEP`. Each change of the transcript stores what there is of an answer so far.
    """
    owner = gr.JSON(value=None, visible=False)

    def on_open(held: Any, picked: str, kept_by: Any, request: gr.Request) -> tuple[Any, Any, Any, Any]:
        try:
            conversation = close_open_turns(read_turns(held)) if kept_by == request.username else []
        except AdapterHubError:  # stored by an older version of the page
            conversation = []
        again = gr.Dropdown(value=picked) if conversation else gr.skip()
        return chat_bubbles(conversation), write_turns(conversation), again, request.username

    kept = [turns, task, owner]
    gr.on([opened], on_open, kept, [chatbot, *kept], js=_BRING_BACK, queue=False, show_progress="hidden")
    chatbot.change(None, kept, None, js=_KEEP, show_progress="hidden")
    return kept


def build_settings() -> list[Any]:
    """Lay out the answer length, the temperature, and whether earlier turns are included."""
    with gr.Accordion("Settings", open=False):
        return [
            gr.Slider(8, 512, value=128, step=8, label="Maximum answer length, tokens"),
            gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0 is greedy)"),
            gr.Checkbox(value=True, label="Include the task's own earlier turns"),
        ]


def build_question_row() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """Lay out the message box with its Send and Stop buttons, one of which is visible."""
    with gr.Row(elem_id="ask"):
        question = gr.Textbox(
            show_label=False, label="Your message", placeholder="Message; Enter sends", lines=1,
            max_lines=6, scale=8, container=False, autofocus=True, elem_id="question",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop", visible=False)
    return question, send, stop


def _updates(held: Any, answering: Callable[[list[Turn]], Iterator[list[Turn]]]) -> Iterator[tuple[Any, ...]]:
    """Convert snapshots of a conversation to updates of (chatbot, turns, question, send, stop)."""
    snapshot: list[Turn] = []
    try:
        for number, snapshot in enumerate(answering(read_turns(held))):
            bubbles = chat_bubbles(snapshot)
            if number == 0:
                yield bubbles, write_turns(snapshot), "", gr.Button(visible=False), gr.Button(visible=True)
            else:
                yield bubbles, gr.skip(), gr.skip(), gr.skip(), gr.skip()
    except Exception as error:  # the page holds no readable conversation; errors of an answer itself become turns
        snapshot = [Turn(role="assistant", text="", by="app", notice=sentence(error))]
    yield chat_bubbles(snapshot), write_turns(snapshot), gr.skip(), gr.Button(visible=True), gr.Button(visible=False)
