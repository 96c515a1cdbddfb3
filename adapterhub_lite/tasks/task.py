"""What a task is: a seeded source of question and answer pairs."""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from adapterhub_lite.errors import DataError

Row = dict[str, list[dict[str, str]]]
Split = Literal["train", "held-out"]
# One question in this many is held out.
HELD_OUT_SHARE = 5
# This many draws without a new question mean that the task is exhausted.
EXHAUSTED_AFTER = 20_000


@dataclass(frozen=True)
class Task:
    """One task. `sample` draws a (question, answer) pair.

    Rows carry no system message, so that the adapter answers a bare question.
    """

    name: str
    description: str
    sample: Callable[[random.Random], tuple[str, str]]

    @property
    def data_id(self) -> str:
        """What a training record calls its rows."""
        return f"adapterhub-lite/tasks/{self.name}"

    def rows(self, count: int, *, seed: int = 0, split: Split = "train") -> list[Row]:
        """Return `count` chats, distinct within the call: `{"messages": [user, assistant]}`.

        The same arguments give the same rows on every machine. No question is in both splits.

        Raises:
            DataError: the task does not have so many different questions.
        """
        return [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in islice(self.pairs(seed, split), count)
        ]

    def questions(self, count: int) -> list[str]:
        """Held-out questions, to try with what has learned the task."""
        return [question for question, _ in islice(self.pairs(0, "held-out"), count)]

    def pairs(self, seed: int, split: Split) -> Iterator[tuple[str, str]]:
        """Yield distinct (question, answer) pairs of one split until the task has no more; raises as `rows` does."""
        generator = random.Random(f"{self.name}/{seed}")
        seen: set[str] = set()
        misses = 0
        while misses < EXHAUSTED_AFTER:
            question, answer = self.sample(generator)
            misses += 1
            if question not in seen and split_of(question) == split:
                misses = 0
                seen.add(question)
                yield question, answer
        raise DataError(f"The task {self.name!r} has only {len(seen)} different {split} questions. Ask for fewer rows.")


def split_of(question: str) -> Split:
    """Return the split of a question, which depends on its text alone."""
    held_out = hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_SHARE == 0
    return "held-out" if held_out else "train"
