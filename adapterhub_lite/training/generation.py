"""Answers of the model in training, for metrics on generated text. A plain greedy loop: serving is another room."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.training.exact_match import Turns, evaluate_exact_match

Judge = Callable[[str, str], float]


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, chats: list[Turns], max_new_tokens: int = 64
) -> list[str]:
    """Return the greedy answer to each chat, in order; all chats are one batch, padded on the left."""
    prompts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in chats]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    longest = max(len(row) for row in ids)
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
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
