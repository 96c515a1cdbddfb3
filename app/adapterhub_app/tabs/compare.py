"""The Compare tab's handlers: one prompt to several tasks in one mixed batch, and where their answers differ."""

import difflib
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from adapterhub_app.backend import Backend, PendingAnswer
from adapterhub_app.display.answers import Answer, AnswerSettings, grow_answer
from adapterhub_app.display.escape import shown
from adapterhub_app.display.notice import sentence
from adapterhub_app.display.task import BASE, Task
from adapterhub_lite.errors import AdapterHubError

MOST_ADAPTERS = 4
# A word keeps the white space after it, so that unlike texts are not matched by their spaces.
_WORDS = re.compile(r"\S+\s*|\s+")
# Below this likeness (0 to 1) a word-by-word diff is confetti.
_TOO_UNLIKE = 0.3


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


def nearest(earlier: Sequence[str], text: str) -> int | None:
    """Which of the `earlier` answers `text` is to be marked against: the first where it is like enough, or the likest.

    None where it is like none of them: then there is nothing to mark.
    """
    likeness = [_likeness(one, text) for one in earlier]
    if likeness and likeness[0] >= _TOO_UNLIKE:
        return 0
    best = max(range(len(earlier)), key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] >= _TOO_UNLIKE else None


def draw_diff(names: Sequence[str], texts: Sequence[str]) -> str:
    """The last of `texts` against an earlier one, as HTML whose `ins` and `del` are the only markup in it."""
    place = nearest(texts[:-1], texts[-1])
    if place is None:
        return '<p class="diff-title">Like none of the answers before it</p>'
    if texts[place] == texts[-1]:
        return f'<p class="diff-title">The same answer as {shown(names[place])}</p>'
    tags = {"added": "ins", "removed": "del", None: "span"}
    marked = "".join(
        f"<{tags[kind]}>{shown(text)}</{tags[kind]}>" for text, kind in diff_words(texts[place], texts[-1])
    )
    return f'<p class="diff-title">Against {shown(names[place])}</p><div class="diff-text">{marked}</div>'


def _likeness(reference: str, other: str) -> float:
    before, after = _WORDS.findall(reference), _WORDS.findall(other)
    return difflib.SequenceMatcher(a=before, b=after, autojunk=False).ratio()
