"""The Chat tab: a question in, a growing conversation out, kept in the browser's tab."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.answers import AnswerSettings, grow_answer
from adapterhub_app.display.colours import task_colours
from adapterhub_app.display.escape import literal_markdown, one_line, sentence
from adapterhub_app.display.task import BASE, Task, describe_task, task_examples
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
from adapterhub_app.tabs.task_cards import build_task_cards, draw_cards
from adapterhub_lite.errors import AdapterHubError, UsageError

WELCOME = (
    "### Ask, then switch\nThe base stays in memory, and a task is a small adapter on it: change it in mid-conversation, "
    "and each answer says who gave it."
)

# A command is a reference behind a slash at the very beginning; a path has another slash in it.
_COMMAND = re.compile(r"/([A-Za-z0-9][\w.:@*+-]*)(?:\s+(.*))?$", re.DOTALL)
# Both run in the page alone: a conversation leaves it only as a file that the person keeps.
# A list that is returned to Gradio is the list of inputs, so the one input stands in a list of its own.
_SAVE = """turns => {
  const link = document.createElement("a")
  link.href = URL.createObjectURL(new Blob([JSON.stringify(turns, null, 1)], {type: "application/json"}))
  link.download = "conversation.json"
  link.click()
}"""
_OPEN = """turns => new Promise(resolve => {
  const field = document.createElement("input")
  field.type = "file"
  field.accept = ".json,application/json"
  field.oncancel = () => resolve([turns])
  field.onchange = async () => {
    try { resolve([JSON.parse(await field.files[0].text())]) } catch { resolve(["no JSON"]) }
  }
  field.click()
})"""

# Gradio reloads the page after a restart of the server, so the conversation is kept in the browser's session storage.
# A page that has just been opened is empty and stores nothing.
_KEEP = """(turns, task, owner) => {
  if (turns?.length) sessionStorage.setItem("conversation", JSON.stringify([turns, task, owner]))
}"""
_FORGET = """() => { sessionStorage.removeItem("conversation") }"""
_BRING_BACK = """brought => [JSON.parse(sessionStorage.getItem("conversation") ?? "null")]"""
# Who uses the page before the server has answered has begun a conversation, or opened one: that is the one that stays.
# All of it in the page, at one moment: what the server drew for it may no longer be what there is to draw.
_TAKE_BACK = """(brought, drawn, turns, task, bubbles) =>
  turns?.length || !brought ? [turns, task, bubbles] : [...brought, drawn]"""
# Not by `autofocus`, which scrolls the title out of sight; not on a phone, where a keyboard would cover the page;
# not away from what somebody has clicked already.
_BEGIN_TYPING = """() => {
  if (innerWidth <= 640 || document.activeElement !== document.body) return
  document.querySelector("#question textarea")?.focus({preventScroll: true})
}"""
# A line that opens is a button of Gradio's with a second one inside that has no name: here that one is only an arrow.
_ARROWS = """() => {
  const transcript = document.querySelector("#transcript")
  const disarm = () => transcript.querySelectorAll(".thought-group .title button:not([disabled])").forEach(arrow => {
    arrow.disabled = true
    arrow.setAttribute("aria-hidden", "true")
  })
  new MutationObserver(disarm).observe(transcript, {childList: true, subtree: true})
  disarm()
}"""
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
        parts = {"text": answer.text, "receipt": answer.receipt, "notice": answer.notice, "tokens": answer.tokens}
        yield [*conversation, reply.model_copy(update=parts)]


def command_in(text: str, picked: str | None) -> tuple[str, str]:
    """(task, question) of a message that may begin with a command such as `/sql@prod` or `/base`; else as it was."""
    found = _COMMAND.match(text.strip())
    if found is None:
        return picked or BASE, text
    name, question = found[1], found[2] or ""
    if name == "base":
        return BASE, question
    try:
        return str(Task.parse(name)), question
    except AdapterHubError:
        return picked or BASE, text


def last_two(turns: Sequence[Turn], picked: str | None) -> tuple[str, list[str]]:
    """The last question, and the adapters whose answers to lay side by side: who answered it, and who is picked now."""
    question = next((turn.text for turn in reversed(turns) if turn.role == "user"), "")
    answered = next((turn.by for turn in reversed(turns) if turn.role == "assistant" and turn.by), None)
    found: list[str] = []
    for one in (answered, picked):
        if one and one not in (BASE, "base", *found) and "×" not in one and "+" not in one and "*" not in one:
            found.append(one)
    return question, found


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


@dataclass(frozen=True)
class ChatTab:
    """The parts that the page connects to others: what stands about the task, the conversation, the side-by-side button.

    `facts` are description, examples and cards, for `facts_of`.
    """

    facts: list[Any]
    turns: gr.JSON
    beside: gr.Button


@dataclass(frozen=True)
class ChatParts:
    """What stands on the tab. `answer` is what an answer updates: transcript, turns, question, Send and Stop."""

    cards: gr.HTML
    about: gr.Markdown
    examples: gr.Dataset
    settings: list[Any]
    answer: list[Any]
    again: gr.Button
    beside: gr.Button
    clear: gr.Button
    save: gr.Button
    load: gr.Button


def build_chat_tab(backend: Backend, task: gr.Dropdown, opened: Any) -> ChatTab:
    """Lay out the tab around the task picker and connect it; `opened` is the event of a page being opened."""
    parts = lay_out(backend, task)
    connect_answers(backend, task, parts, opened)
    parts.examples.click(lambda row: row[0], parts.examples, parts.answer[2], queue=False, show_progress="hidden")
    connect_files(backend, parts)
    return ChatTab([parts.about, parts.examples, parts.cards], parts.answer[1], parts.beside)


def lay_out(backend: Backend, task: gr.Dropdown) -> ChatParts:
    """The tasks at the side; the conversation, the message box and what can be done with both."""
    # The conversation lives in the page (see transcript.py); this invisible component carries it to and from the server.
    turns = gr.JSON(value=[], visible=False)
    with gr.Row(equal_height=False, elem_id="chat"):
        with gr.Column(scale=1, min_width=260, elem_id="chat-side"):
            cards = build_task_cards(backend, task)
            task.render()
            about = gr.Markdown(
                literal_markdown(describe_task(BASE, backend.registry)), elem_id="task-about", elem_classes="told"
            )
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
                beside = gr.Button("Side by side", size="sm", elem_id="beside")
                clear = gr.Button("New conversation", size="sm", elem_id="clear")
                save = gr.Button("Save as file", size="sm", elem_id="save")
                load = gr.Button("Open a file", size="sm", elem_id="open")
    answer = [chatbot, turns, question, send, stop]
    return ChatParts(cards, about, examples, settings, answer, again, beside, clear, save, load)


def connect_answers(backend: Backend, task: gr.Dropdown, parts: ChatParts, opened: Any) -> None:
    """Connect what asks, asks again and stops."""
    chatbot, turns, question, send, stop = parts.answer

    def on_ask(
        picked: str, text: str, held: Any, tokens: float, heat: float, earlier: bool, odds: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        session, how = str(request.session_hash), AnswerSettings(int(tokens), float(heat), bool(odds))
        chosen, words = command_in(text, picked)
        switch = gr.Dropdown(value=chosen) if chosen != picked else gr.skip()
        if chosen != picked and not words.strip():
            yield gr.skip(), gr.skip(), "", gr.skip(), gr.skip(), switch
            return
        asked = _updates(
            backend, held, lambda turns: ask(backend, session, chosen, words, turns, how, remember=earlier)
        )
        for number, update in enumerate(asked):
            yield *update, switch if number == 0 else gr.skip()

    def on_retry(
        picked: str, held: Any, tokens: float, heat: float, earlier: bool, odds: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        session, how = str(request.session_hash), AnswerSettings(int(tokens), float(heat), bool(odds))
        yield from _updates(backend, held, lambda turns: retry(backend, session, picked, turns, how, remember=earlier))

    def on_stop(request: gr.Request) -> None:
        backend.live.stop(str(request.session_hash))

    asked = gr.on(
        [question.submit, send.click], on_ask, [task, question, turns, *parts.settings], [*parts.answer, task],
        trigger_mode="once", show_progress="hidden",
    )  # fmt: skip
    retried = parts.again.click(
        on_retry, [task, turns, *parts.settings], parts.answer, trigger_mode="once", show_progress="hidden"
    )
    kept = keep_conversation(backend, chatbot, turns, task, opened)
    for answering in (asked, retried):
        answering.failure(None, chatbot, [chatbot, send, stop], js=_SERVER_WENT_AWAY, show_progress="hidden")
        answering.then(None, kept, None, js=_KEEP, show_progress="hidden")
    stop.click(on_stop, queue=False)
    opened(None, js=_BEGIN_TYPING)
    opened(None, js=_ARROWS)


def facts_of(backend: Backend, picked: str | None) -> list[Any]:
    """What stands about the picked task: its description, its examples, and the cards with its own pressed."""
    samples = [[example] for example in task_examples(picked, backend.registry)]
    described = describe_task(picked, backend.registry, backend.engine.base_fingerprint)
    return [
        literal_markdown(described), gr.Dataset(samples=samples, visible=bool(samples)), draw_cards(backend, picked)
    ]  # fmt: skip


def connect_files(backend: Backend, parts: ChatParts) -> None:
    """Connect what begins a new conversation, keeps this one as a file, and opens one that was kept."""
    chatbot, turns, question, *_ = parts.answer

    def on_file(held: Any) -> tuple[Any, Any, Any]:
        try:
            conversation = close_open_turns(read_turns(held or "nothing"))
        except AdapterHubError:
            notice = "This file holds no conversation of this app. Choose one that `Save as file` wrote."
            conversation = [Turn(role="assistant", text="", by="app", notice=notice)]
        return bubbles_of(backend, conversation), write_turns(conversation), gr.skip()

    parts.clear.click(lambda: ([], [], ""), None, [chatbot, turns, question], queue=False)
    parts.clear.click(None, js=_FORGET)
    parts.save.click(None, turns, None, js=_SAVE)
    parts.load.click(on_file, turns, [chatbot, turns, question], js=_OPEN, queue=False, show_progress="hidden")


def bubbles_of(backend: Backend, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages of a conversation, with the tasks in the colours that they have on the cards now."""
    return chat_bubbles(turns, task_colours(backend.registry.list()))


def keep_conversation(
    backend: Backend, chatbot: gr.Chatbot, turns: gr.JSON, task: gr.Dropdown, opened: Any
) -> list[Any]:
    """Keep the conversation in the browser's tab, and restore it for the same person when the page is reloaded.

    Returns the inputs of `_KEEP`. Each change of the transcript stores what there is of an answer so far.
    """
    owner, brought = gr.JSON(value=None, visible=False), gr.JSON(value=None, visible=False)
    drawn = gr.Chatbot(visible=False, render_markdown=False, allow_tags=False, latex_delimiters=[])

    def on_open(stored: Any, request: gr.Request) -> tuple[Any, Any, Any]:
        # In a list, because Gradio's JSON takes a text for JSON that is still to be read.
        person = [request.username] if request.username else None
        try:
            held, picked, kept_by = stored or ([], None, None)
            conversation = close_open_turns(read_turns(held)) if kept_by == person else []
        except (AdapterHubError, TypeError, ValueError):  # stored by an older version of the page
            conversation = []
        found = [write_turns(conversation), picked] if conversation else None
        return found, bubbles_of(backend, conversation), person

    kept = [turns, task, owner]
    asked = opened(on_open, brought, [brought, drawn, owner], js=_BRING_BACK, show_progress="hidden", queue=False)
    here = [turns, task, chatbot]
    asked.then(None, [brought, drawn, *here], here, js=_TAKE_BACK, show_progress="hidden")
    chatbot.change(None, kept, None, js=_KEEP, show_progress="hidden")
    return kept


def build_settings() -> list[Any]:
    """Lay out the answer length, the temperature, and what goes along with question and answer."""
    with gr.Accordion("Settings", open=False):
        return [
            gr.Slider(8, 512, value=128, step=8, label="Maximum answer length, tokens"),
            gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0 is greedy)"),
            gr.Checkbox(value=True, label="Include the task's own earlier turns"),
            gr.Checkbox(value=False, label="Show how probable each token was", elem_id="probabilities"),
        ]


def build_question_row() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """Lay out the message box with its Send and Stop buttons, one of which is visible."""
    with gr.Row(elem_id="ask"):
        question = gr.Textbox(
            show_label=False, label="Your message", placeholder="Message; /name switches", lines=1,
            max_lines=6, scale=8, container=False, elem_id="question",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop", visible=False)
    return question, send, stop


def _updates(
    backend: Backend, held: Any, answering: Callable[[list[Turn]], Iterator[list[Turn]]]
) -> Iterator[tuple[Any, ...]]:
    """Convert snapshots of a conversation to updates of (chatbot, turns, question, send, stop)."""
    snapshot: list[Turn] = []
    colours = task_colours(backend.registry.list())
    try:
        for number, snapshot in enumerate(answering(read_turns(held))):
            bubbles = chat_bubbles(snapshot, colours)
            if number == 0:
                yield bubbles, write_turns(snapshot), "", gr.Button(visible=False), gr.Button(visible=True)
            else:
                yield bubbles, write_turns(snapshot), gr.skip(), gr.skip(), gr.skip()
    except Exception as error:  # the page holds no readable conversation; errors of an answer itself become turns
        snapshot = [Turn(role="assistant", text="", by="app", notice=sentence(error))]
    yield (
        chat_bubbles(snapshot, colours),
        write_turns(snapshot),
        gr.skip(),
        gr.Button(visible=True),
        gr.Button(visible=False),
    )
