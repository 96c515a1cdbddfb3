"""The Compare tab's handlers: one prompt to several tasks in one mixed batch, and where their answers differ."""

import difflib
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from adapterhub_lite.errors import AdapterHubError
from app.answers import Answer, AnswerSettings, grow_answer
from app.backend import Backend, PendingAnswer
from app.notice import sentence
from app.task import BASE, Task

MOST_ADAPTERS = 4
# A word keeps the white space after it, so that unlike texts are not matched by their spaces.
_WORDS = re.compile(r"\S+\s*|\s+")


def compare(
    backend: Backend, session: str, prompt: str, adapters: Sequence[str], settings: AnswerSettings
) -> Iterator[list[Answer]]:
    """Yield the answers of the base and then of each adapter as they grow together; the last list is complete.

    A task that cannot answer has its sentence in its place, the others go on. Closing the iterator cancels them all.
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
            for place, answer in _take(updates):
                answers[place] = answer
            yield list(answers)


def _take(updates: "queue.SimpleQueue[tuple[int, Answer]]") -> Iterator[tuple[int, Answer]]:
    """Wait for one update, then take all that are there: one drawing of the page shows them together."""
    yield updates.get()
    while not updates.empty():
        yield updates.get()


def live_key(session: str) -> str:
    """Under which the comparison of a session counts as under way, so that Stop here leaves its chat alone."""
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
