"""Exact-match evaluation of generated text. Generation is handed in: training knows no serving."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_lite.errors import DataError

Turns = list[dict[str, str]]
BATCH_ROWS = 16
SHOWN = 3


@dataclass(frozen=True)
class Example:
    """One question with the answer that was wanted and the one that came."""

    prompt: str
    wanted: str
    found: str


@dataclass(frozen=True)
class ExactMatch:
    """How many answers were right, word for word, and the first few wrong ones."""

    correct: int
    total: int
    examples: tuple[Example, ...]

    @property
    def share(self) -> float:
        """The share of right answers, 0 to 1."""
        return self.correct / self.total


def evaluate_exact_match(
    generate: Callable[[list[Turns]], Sequence[str]],
    rows: Iterable[Mapping[str, Any]],
    *,
    normalize: Callable[[str], str] = str.strip,
    batch_rows: int = BATCH_ROWS,
    also: Callable[[str, str], object] | None = None,
) -> ExactMatch:
    """Ask `generate` for the last assistant turn of each row and compare it, after `normalize`, with the row's own.

    `generate` takes chats (each a list of turns that ends with the user's) and returns one answer a chat, in order;
    it gets `batch_rows` chats at a time. `also` is called with (wanted, found)
    of every row, for metrics of your own. Rows carry `messages`, or `prompt` and `completion`; a prompt that is a string
    is asked as a user's turn, though training takes it as raw text (the `eval` verb asks it raw).

    Raises:
        DataError: a row does not end with an assistant turn, or `generate` returned another number of answers.
    """
    correct = total = 0
    wrong: list[Example] = []
    questions = [question_of(row) for row in rows]
    for start in range(0, len(questions), batch_rows):
        batch = questions[start : start + batch_rows]
        answers = _answers(generate, batch)
        for (turns, wanted), found in zip(batch, answers, strict=True):
            right = normalize(found) == normalize(wanted)
            correct, total = correct + right, total + 1
            if not right and len(wrong) < SHOWN:
                wrong.append(Example(turns[-1]["content"], wanted, found))
            if also is not None:
                also(wanted, found)
    if not total:
        raise DataError("There are no rows to evaluate on. Give at least one.")
    return ExactMatch(correct, total, tuple(wrong[:SHOWN]))


def question_of(row: Mapping[str, Any]) -> tuple[Turns, str]:
    """The chat of a row up to its last answer, and that answer.

    Raises:
        DataError: the row does not end with an assistant turn.
    """
    if "messages" in row:
        turns = list(row["messages"])
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise DataError(
                "Exact match wants rows that end with an assistant turn. Remove the turns after the answer."
            )
        return turns[:-1], turns[-1]["content"]
    if "prompt" in row and isinstance(row["prompt"], str):
        return [{"role": "user", "content": row["prompt"]}], row["completion"]
    if "prompt" in row:
        return list(row["prompt"]), row["completion"][-1]["content"]
    raise DataError(f"Exact match wants messages, or prompt and completion, found {', '.join(map(repr, row))}.")


def _answers(generate: Callable[[list[Turns]], Sequence[str]], batch: list[tuple[Turns, str]]) -> Sequence[str]:
    answers = generate([turns for turns, _ in batch])
    if len(answers) != len(batch):
        raise DataError(
            f"generate was given {len(batch)} chats and returned {len(answers)} answers; one each is wanted."
        )
    return answers
