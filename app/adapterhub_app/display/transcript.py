"""A conversation as the page holds it: turns in, model messages or chat bubbles out. Knows nothing of the engine.

The page keeps the conversation, not the server, so that it survives a restart of the server and stays private.
What a page sends back is validated strictly: unknown keys, wrong types and over-long turns are refused.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from adapterhub_app.display.answers import MOST_TOKENS, Receipt
from adapterhub_app.display.colours import colour_of
from adapterhub_app.display.escape import shown
from adapterhub_app.display.kinds import call_card, show_answer, token_strip
from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import DataError

MAX_TURNS = 200
MAX_CHARACTERS = 20_000
IS_ANSWERING = " is answering"
INTERRUPTED = "interrupted before the answer was complete"


class Turn(StrictModel):
    """One turn. An answer carries the displayed name of who gave it (`by`) and, once complete, its receipt.

    `notice` is a sentence shown when the answer is missing or cut short.
    """

    role: Literal["user", "assistant"]
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    by: Annotated[str, Field(max_length=300)] | None = None
    receipt: Receipt | None = None
    notice: Annotated[str, Field(max_length=2_000)] | None = None
    tokens: Annotated[
        tuple[tuple[Annotated[str, Field(max_length=1_000)], float], ...], Field(max_length=MOST_TOKENS)
    ] = ()

    @property
    def is_open(self) -> bool:
        """Whether it is an answer still in progress."""
        return self.role == "assistant" and self.receipt is None and self.notice is None


_TURNS: TypeAdapter[list[Turn]] = TypeAdapter(Annotated[list[Turn], Field(max_length=MAX_TURNS)])


def read_turns(value: object) -> list[Turn]:
    """Read the turns a page sent (None for a new conversation).

    Raises:
        DataError: they are not a conversation of this app, or exceed its limits.
    """
    try:
        # Through JSON text, because strict validation accepts a list for a tuple only in JSON mode.
        return _TURNS.validate_json(json.dumps(value or []))
    except ValidationError as error:
        raise DataError(
            f"The conversation in this page cannot be continued (expected at most {MAX_TURNS} turns of {MAX_CHARACTERS} "
            f"characters, found {error.error_count()} errors). Start a new one."
        ) from error


def write_turns(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Convert turns to plain JSON values for the page to keep."""
    return [turn.model_dump(mode="json") for turn in turns]


def model_messages(turns: Sequence[Turn], by: str, *, remember: bool) -> list[dict[str, str]]:
    """The last question for `by`; with `remember`, preceded by the earlier questions that `by` answered, and its answers.

    Answers of other tasks are left out: an adapter for SQL would imitate the style of the answers it is shown.
    """
    kept: list[Turn] = []
    for question, answer in itertools.pairwise(turns if remember else ()):
        if question.role == "user" and answer.role == "assistant" and answer.by == by and answer.text:
            kept += [question, answer]
    kept += [turn for turn in turns if turn.role == "user"][-1:]
    return [{"role": turn.role, "content": turn.text} for turn in kept]


def close_open_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Mark every answer that never completed (because the server stopped) as interrupted."""
    return [turn.model_copy(update={"notice": INTERRUPTED}) if turn.is_open else turn for turn in turns]


def chat_bubbles(turns: Sequence[Turn], colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """Convert turns to messages for the chat component; each answer is followed by the line that says who gave it.

    `colours` are those of `task_colours`.
    """
    bubbles: list[dict[str, Any]] = []
    for turn in turns:
        if turn.role == "user" or turn.is_open:
            bubbles.append({"role": turn.role, "content": _literal(turn.text)})
        else:
            bubbles += answer_bubbles(turn)
        if turn.role == "assistant":
            bubbles.append(receipt_bubble(turn, colours))
        if turn.tokens:
            bubbles.append(_folded("How probable each token was", token_strip(turn.tokens)))
    return bubbles


def answer_bubbles(turn: Turn) -> list[dict[str, Any]]:
    """A complete answer as what it is: its reasoning folded, calls of tools as cards, JSON and SQL laid out."""
    answer = show_answer(turn.text)
    bubbles = [_folded("Reasoning", shown(answer.reasoning))] if answer.reasoning else []
    calls = "\n".join(call_card(name, arguments) for name, arguments in answer.calls)
    html = "\n".join(part for part in (answer.html, calls) if part)
    return [*bubbles, {"role": "assistant", "content": [{"type": "text", "text": html}]}]


def _folded(title: str, html: str) -> dict[str, Any]:
    content = [{"type": "text", "text": html}]
    return {"role": "assistant", "content": content, "metadata": {"title": title, "status": "done"}}


def receipt_bubble(turn: Turn, colours: Mapping[str, int]) -> dict[str, Any]:
    """The line under an answer: who gave it, its receipt or notice; the receipt's details when opened."""
    who = turn.by or "base"
    if turn.is_open:
        title, status, details = IS_ANSWERING, "pending", ""
    else:
        title = " · ".join(part for part in (turn.receipt.line("") if turn.receipt else "", turn.notice) if part)
        status, details = "done", turn.receipt.details() if turn.receipt else ""
    heading = (
        f'<strong class="{colour_of(who, colours)}">{shown(who)}</strong>{"" if turn.is_open else " · "}{shown(title)}'
    )
    return {"role": "assistant", "content": _literal(details), "metadata": {"title": heading, "status": status}}


def _literal(text: str) -> list[dict[str, str]]:
    # A typed part, because Gradio strips the indentation of bare strings, and answers may be code.
    return [{"type": "text", "text": shown(text)}]
