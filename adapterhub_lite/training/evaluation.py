"""Exact-match evaluation of generated text, and answers of the model in training by a plain greedy loop.

Serving is another room: whoever has an engine hands its `generate` in.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases.encoding import padding_id
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
        answers = generate([turns for turns, _ in batch])
        if len(answers) != len(batch):
            raise DataError(
                f"generate was given {len(batch)} chats and returned {len(answers)} answers; give one each."
            )
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
        return turns[:-1], _text_of(turns[-1])
    if "prompt" in row and isinstance(row["prompt"], str):
        return [{"role": "user", "content": row["prompt"]}], row["completion"]
    if "prompt" in row:
        return list(row["prompt"]), _text_of(row["completion"][-1])
    raise DataError(f"Exact match wants messages, or prompt and completion, found {', '.join(map(repr, row))}.")


def _text_of(turn: Mapping[str, Any]) -> str:
    """What an answer says, where it says something."""
    content = turn.get("content")
    text = "".join(part["text"] for part in content) if isinstance(content, list) else content
    if not text:
        raise DataError(
            "Answers can be compared only where they are text, and one of these calls a tool. Compare such rows by loss."
        )
    return str(text)


Judge = Callable[[str, str], float]


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Turns | str], max_new_tokens: int = 64
) -> list[str]:
    """Return the greedy answer to each chat, or to each raw prompt, in order; one batch, padded on the left."""
    ids = []
    for asked in chats:
        if isinstance(asked, str):
            ids.append(tokenizer(asked)["input_ids"])
        else:
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    longest = max(len(row) for row in ids)
    device = next(model.parameters()).device
    pad = padding_id(tokenizer)
    batch = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    was_training = model.training
    model.eval()
    try:
        found = model.generate(
            input_ids=batch,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    finally:
        model.train(was_training)
    return [str(text) for text in tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)]


class GeneratedMetrics:
    """Metrics on the text that the model in training writes: the share of exact answers, and those of your own.

    `rows` are asked a batch at a time, and each answer is judged as it comes: never a stack of logits. `judges` are
    further metrics by name: each takes (wanted, found) and returns a number; the mean is kept. Pass an instance as the
    trainer's `generated_metrics`; it is asked in each evaluation, also in each of several sets.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        judges: Mapping[str, Judge] | None = None,
        *,
        max_new_tokens: int = 64,
    ) -> None:
        self.rows = list(rows)
        self.judges = dict(judges or {})
        self.max_new_tokens = max_new_tokens

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, prefix: str) -> dict[str, float]:
        """Let `model` answer; returns `<prefix>_exact_match` (0 to 1) and the mean of each judge."""
        sums = dict.fromkeys(self.judges, 0.0)

        def generate(chats: list[Turns]) -> list[str]:
            return generate_answers(model, tokenizer, chats, self.max_new_tokens)

        def judge(wanted: str, found: str) -> None:
            for name, one in self.judges.items():
                sums[name] += one(wanted, found)

        match = evaluate_exact_match(generate, self.rows, also=judge)
        means = {f"{prefix}_{name}": total / match.total for name, total in sums.items()}
        return {f"{prefix}_exact_match": match.share, **means}
