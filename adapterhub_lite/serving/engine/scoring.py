"""Log-probabilities of tokens that are given rather than chosen: the prompt's own, and those of labels after it.

Both read logits while the prompt is computed. Labels are then computed in the same row, one after the other, each over
the place of the one before: the prompt is computed once, whatever the number of labels.
"""

from collections.abc import Sequence

import torch

from adapterhub_lite.serving.engine.request import TokenLogprob


class PromptLogprobs:
    """Collects the log-probability of each token of a prompt, and of `top` alternatives."""

    def __init__(self, prompt_ids: Sequence[int], top: int) -> None:
        self._ids, self._top = prompt_ids, top
        self.found = [TokenLogprob(prompt_ids[0], None)]

    def wanted(self, start: int, count: int) -> int:
        """How many of the last logits are wanted of `count` tokens from place `start` on."""
        return count if start < len(self._ids) else 1

    def read(self, start: int, logits: torch.Tensor) -> None:
        """Take the logits (n, vocabulary) float32 that follow the n tokens from place `start` on."""
        chosen = list(self._ids[start + 1 : start + 1 + logits.shape[0]])
        if start >= len(self._ids) or not chosen:
            return
        logprobs = torch.log_softmax(logits[: len(chosen)], dim=-1)
        own = logprobs.gather(1, torch.tensor(chosen)[:, None])[:, 0].tolist()
        values, ids = torch.topk(logprobs, self._top)
        for token, value, others in zip(chosen, own, zip(ids.tolist(), values.tolist(), strict=True), strict=True):
            self.found.append(TokenLogprob(token, value, tuple(zip(*others, strict=True))))


class LabelLogprobs:
    """Sums the log-probabilities of the tokens of each label.

    The logits after the prompt are those of every label's first token. For the others the row computes paths: labels
    without their last token, as far as none is the beginning of another one.
    """

    def __init__(self, prompt_length: int, labels: Sequence[Sequence[int]]) -> None:
        self._prompt_length, self._labels = prompt_length, labels
        self._counted = [0] * len(labels)
        self.totals = [0.0] * len(labels)
        proper = {tuple(label[:-1]) for label in labels}
        covered = {path[:length] for path in proper for length in range(len(path))}
        self._left = sorted(proper - covered - {()})
        self.path: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(len(label) - 1 for label in self._labels)

    def wanted(self, start: int, count: int) -> int:
        """How many of the last logits are wanted of `count` tokens from place `start` on."""
        return max(1, min(count, start + count - (self._prompt_length - 1)))

    def read(self, start: int, logits: torch.Tensor) -> None:
        """Take the logits (n, vocabulary) float32 that follow the n tokens from place `start` on."""
        for known, row in enumerate(logits, start - self._prompt_length + 1):
            following = [
                index
                for index, label in enumerate(self._labels)
                if self._counted[index] == known < len(label) and tuple(label[:known]) == self.path[:known]
            ]
            if known < 0 or not following:
                continue
            logprobs = torch.log_softmax(row, dim=-1)
            for index in following:
                self.totals[index] += float(logprobs[self._labels[index][known]])
                self._counted[index] += 1

    def next_path(self) -> tuple[int, ...] | None:
        """The tokens to compute after the prompt next; None when every label has its sum."""
        if not self._left:
            return None
        self.path = self._left.pop()
        return self.path
