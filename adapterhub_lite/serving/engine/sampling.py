"""Choosing the next token of one request from its logits.

In this order: `logit_bias`, the penalties, what may not come (`allowed_token_ids`, the ends before `min_tokens`, what the
answer's form does not take), temperature, `top_k`, `top_p`, `min_p`. Each computes what transformers' logits processors
do; presence and frequency penalties, which it does not have, are OpenAI's.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.engine.request import GenerationRequest, TokenLogprob


class Sampler:
    """Chooses the tokens of one request, of which `ends` end it. Its stream depends on the seed alone, never on the
    batch around it.
    """

    def __init__(self, request: GenerationRequest, prompt_ids: Sequence[int], ends: Collection[int] = ()) -> None:
        self._request = request
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        self._written: Counter[int] = Counter()
        self._seen = set(prompt_ids) if request.repetition_penalty != 1.0 else None
        self._bias_ids, self._bias = _ids(request.logit_bias), torch.tensor(list(request.logit_bias.values()))
        self._allowed = None if request.allowed_token_ids is None else _ids(request.allowed_token_ids)
        self._ends = _ids(ends)
        # Whether the likeliest token is the answer, whatever was written.
        self._plain = request.temperature == 0.0 and not (
            request.logit_bias or request.presence_penalty or request.frequency_penalty or request.min_tokens
            or self._seen is not None or self._allowed is not None
        )  # fmt: skip

    def choose(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> int:
        """Return the next token id; logits (vocabulary,) float32 and allowed (vocabulary,) bool, left as they are.

        Raises:
            ConfigurationError: no token may come next.
        """
        if self._plain and allowed is None:
            return int(logits.argmax())
        scores = self.scores(logits, allowed)
        if self._request.temperature == 0.0:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(self.probabilities(scores), 1, generator=self._generator))
        self._written[token] += 1
        if self._seen is not None:
            self._seen.add(token)
        return token

    def scores(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits (vocabulary,) with bias and penalties; -inf for what may not come."""
        request = self._request
        scores = logits.clone()
        if request.logit_bias:
            scores[self._bias_ids] += self._bias
        if self._seen is not None:
            seen = _ids(self._seen)
            penalty, old = request.repetition_penalty, scores[seen]
            scores[seen] = torch.where(old > 0, old / penalty, old * penalty)
        if self._written and (request.presence_penalty or request.frequency_penalty):
            counts = torch.tensor(list(self._written.values()), dtype=torch.float32)
            scores[_ids(self._written)] -= request.presence_penalty + request.frequency_penalty * counts
        if self._allowed is not None:
            kept = scores[self._allowed]
            scores.fill_(-torch.inf)[self._allowed] = kept
        if self._written.total() < request.min_tokens:
            scores[self._ends] = -torch.inf
        if allowed is not None:
            scores.masked_fill_(~allowed, -torch.inf)
        if scores.max() == -torch.inf:
            raise ConfigurationError(
                "The answer cannot go on: no token is left that its form, allowed_token_ids, logit_bias and min_tokens allow."
            )
        return scores

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the probability (vocabulary,) float64 of each token to be chosen; scores as `scores` gives them."""
        request = self._request
        # float64: a temperature of 1e-6 must sharpen, not overflow. The largest is 0.
        scores = (scores.double() - scores.max()) / request.temperature
        width = min(request.top_k or scores.shape[0], scores.shape[0])
        if width < scores.shape[0] or request.top_p < 1.0:
            kept, order = torch.topk(scores, width)
            sorted_probabilities = torch.softmax(kept, dim=-1)
            # Keep the smallest set that reaches top_p: those whose forerunners have not reached it yet.
            before = sorted_probabilities.cumsum(-1) - sorted_probabilities
            kept[before >= request.top_p] = -torch.inf
            scores = torch.full_like(scores, -torch.inf).scatter_(0, order, kept)
        if request.min_p > 0.0:
            scores = scores.masked_fill(scores < math.log(request.min_p), -torch.inf)
        return torch.softmax(scores, dim=-1)


def token_logprob(logits: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """Return the log-probability of `token_id` and of the `top` likeliest tokens; logits (vocabulary,) float32."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, top)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _ids(values: Collection[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.long)
