"""The Chat tab's handlers: a question in, a growing conversation out. Knows turns, not the components."""

from collections.abc import Iterator, Sequence

from adapterhub_app.backend import Backend
from adapterhub_app.display.answers import AnswerSettings, grow_answer
from adapterhub_app.display.escape import one_line
from adapterhub_app.display.notice import sentence
from adapterhub_app.display.task import Task
from adapterhub_app.display.transcript import MAX_CHARACTERS, MAX_TURNS, Turn, close_open_turns, model_messages
from adapterhub_lite.errors import AdapterHubError, UsageError


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
    """Yield the conversation with the question, then with its growing answer, last with its receipt or a notice.

    `remember` sends the task's own earlier turns along. Closing the iterator cancels the answer.
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
    """Ask the last question again, of the task picked now, in place of the answer it had."""
    questions = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not questions:
        yield list(turns)
        return
    last = questions[-1]
    yield from ask(backend, session, task_text, turns[last].text, turns[:last], settings, remember=remember)
