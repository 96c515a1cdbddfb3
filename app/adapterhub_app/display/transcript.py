"""A conversation as the page holds it: turns in, model messages or chat bubbles out. Knows no engine.

The page, not the server, keeps the conversation, so that it outlives a restart of the server and is nobody else's.
What comes back from a page is read strictly: unknown keys, wrong types and over-long turns are refused.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from adapterhub_app.display.escape import shown
from adapterhub_app.display.receipt import Receipt
from adapterhub_lite.adapter_format.record import StrictModel
from adapterhub_lite.errors import DataError

MAX_TURNS = 200
MAX_CHARACTERS = 20_000
IS_ANSWERING = " is answering"
INTERRUPTED = "interrupted before the answer was complete"


class Turn(StrictModel):
    """One turn. An answer carries who gave it (`by`, as shown) and, once it is complete, its receipt.

    `notice` is a sentence shown when the answer could not, or not wholly, be given.
    """

    role: Literal["user", "assistant"]
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    by: Annotated[str, Field(max_length=300)] | None = None
    receipt: Receipt | None = None
    notice: Annotated[str, Field(max_length=2_000)] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is an answer of which more is to come."""
        return self.role == "assistant" and self.receipt is None and self.notice is None


_TURNS: TypeAdapter[list[Turn]] = TypeAdapter(Annotated[list[Turn], Field(max_length=MAX_TURNS)])


def read_turns(value: object) -> list[Turn]:
    """Read the turns a page sent (None for a new conversation).

    Raises:
        DataError: they are not a conversation of this app, or longer than it takes.
    """
    try:
        # Through JSON text, so that they are judged as JSON (where a list may fill a tuple) and still strictly.
        return _TURNS.validate_json(json.dumps(value or []))
    except ValidationError as error:
        raise DataError(
            f"This page holds no conversation that can go on (wanted at most {MAX_TURNS} turns of {MAX_CHARACTERS} "
            f"characters, found {error.error_count()} faults). Start a new one."
        ) from error


def write_turns(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as plain JSON values for the page to keep."""
    return [turn.model_dump(mode="json") for turn in turns]


def model_messages(turns: Sequence[Turn], by: str, *, remember: bool) -> list[dict[str, str]]:
    """The last question for `by`, with `remember` after the earlier questions that `by` answered and its answers.

    What another task answered stays out: an adapter for SQL would go on in the manner of the answers it is shown.
    """
    kept: list[Turn] = []
    for question, answer in itertools.pairwise(turns if remember else ()):
        if question.role == "user" and answer.role == "assistant" and answer.by == by and answer.text:
            kept += [question, answer]
    kept += [turn for turn in turns if turn.role == "user"][-1:]
    return [{"role": turn.role, "content": turn.text} for turn in kept]


def close_open_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with every answer that never ended (the server went away meanwhile) marked as interrupted."""
    return [turn.model_copy(update={"notice": INTERRUPTED}) if turn.is_open else turn for turn in turns]


def chat_bubbles(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as messages for the chat component: each answer is followed by the line that says who gave it."""
    bubbles: list[dict[str, Any]] = []
    for turn in turns:
        bubbles.append({"role": turn.role, "content": _literal(turn.text)})
        if turn.role == "assistant":
            bubbles.append(_receipt_bubble(turn))
    return bubbles


def _receipt_bubble(turn: Turn) -> dict[str, Any]:
    who = turn.by or "base"
    if turn.is_open:
        title, status, details = IS_ANSWERING, "pending", ""
    else:
        title = " · ".join(part for part in (turn.receipt.line("") if turn.receipt else "", turn.notice) if part)
        status, details = "done", turn.receipt.details() if turn.receipt else ""
    heading = f"<strong>{shown(who)}</strong>{'' if turn.is_open else ' · '}{shown(title)}"
    return {"role": "assistant", "content": _literal(details), "metadata": {"title": heading, "status": status}}


def _literal(text: str) -> list[dict[str, str]]:
    # A part with a type, because Gradio takes the indentation off bare strings and answers may be code.
    return [{"type": "text", "text": shown(text)}]
