"""From logits to the next token, by each request's own settings and its own random stream."""

from collections.abc import Sequence

import torch

from adapterhub_lite.serving.engine.request import GenerationRequest, TokenLogprob


class Sampler:
    """Chooses the tokens of one request. Its stream depends on the seed alone, never on the batch around it."""

    def __init__(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> None:
        self._request = request
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        self._seen: torch.Tensor | None = None
        if request.repetition_penalty != 1.0:
            self._seen = torch.tensor(sorted(set(prompt_ids)), dtype=torch.long)

    @property
    def plain(self) -> bool:
        """Whether the choice is the largest logit and nothing else."""
        return self._request.temperature == 0.0 and self._seen is None

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token id; logits (vocabulary,) float32, left as they are."""
        request = self._request
        if self._seen is not None:
            logits = logits.clone()
            seen = logits[self._seen]
            penalty = request.repetition_penalty
            logits[self._seen] = torch.where(seen > 0, seen / penalty, seen * penalty)
        token = int(logits.argmax()) if request.temperature == 0.0 else self._draw(logits)
        if self._seen is not None and token not in self._seen:
            self._seen = torch.cat([self._seen, torch.tensor([token])])
        return token

    def _draw(self, logits: torch.Tensor) -> int:
        request = self._request
        # float64: a temperature of 1e-6 must sharpen, not overflow
        scores = (logits.double() - logits.max()) / request.temperature
        width = min(request.top_k or scores.shape[0], scores.shape[0])
        if width < scores.shape[0] or request.top_p < 1.0:
            scores, order = torch.topk(scores, width)
            probabilities = torch.softmax(scores, dim=-1)
            # Keep the smallest set that reaches top_p: those whose forerunners have not reached it yet.
            before = probabilities.cumsum(-1) - probabilities
            probabilities[(before >= request.top_p).nonzero()] = 0.0
            return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator))


def token_logprob(logits: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """Return the log-probability of `token_id` and of the `top` likeliest tokens; logits (vocabulary,) float32."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, top)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
