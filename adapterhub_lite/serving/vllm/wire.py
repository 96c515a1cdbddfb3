"""A request and its answer as vLLM's `/v1/completions` has them. Pure functions: token ids in, token ids out.

A prompt goes over as token ids, so that chat templates, those of adapters too, are laid out here as for the embedded
engine; an answer comes back with its token ids, and log-probabilities name tokens by id.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_lite.errors import ServingError
from adapterhub_lite.serving.engine.request import Form, GenerationRequest, TokenLogprob

Json = dict[str, Any]
TOKEN = "token_id:"  # noqa: S105 - what vLLM writes before a token's id
FORMS = {"schema": "json", "regex": "regex", "choices": "choice", "grammar": "grammar"}


@dataclass(frozen=True)
class Asked:
    """What is computed for a request: `prompt_ids`, at most `limit` new tokens, ended by one of `ends`."""

    request: GenerationRequest
    prompt_ids: Sequence[int]
    limit: int
    ends: Collection[int]
    form: Form | None = None


@dataclass(frozen=True)
class Piece:
    """A part of one answer. `reason` is set in its last one."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    reason: str | None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


def completion_body(asked: Asked, model: str, *, stream: bool) -> Json:
    """The body that asks vLLM's `model`. Each setting is given, so that no default of the other side counts."""
    request = asked.request
    body: Json = {
        "model": model,
        "prompt": list(asked.prompt_ids),
        # It writes at least one token; `pieces` leaves it out again.
        "max_tokens": max(1, asked.limit),
        "min_tokens": min(request.min_tokens, asked.limit),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "stop": list(request.stop),
        # The base's own ends are among `ends`, unless an adapter's are in their place.
        "stop_token_ids": sorted(asked.ends),
        "ignore_eos": True,
        "skip_special_tokens": not request.special_tokens,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    if request.seed is not None:
        body["seed"] = request.seed
    if request.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
    if request.allowed_token_ids is not None:
        body["allowed_token_ids"] = list(request.allowed_token_ids)
    if request.logprobs is not None:
        body["logprobs"] = request.logprobs
    if request.prompt_logprobs is not None:
        body["prompt_logprobs"] = request.prompt_logprobs
    if asked.form is not None:
        body["structured_outputs"] = structured_outputs(asked.form)
    return body


def structured_outputs(form: Form) -> Json:
    """The form of an answer in vLLM's words."""
    text: Any = json.loads(form.text) if form.kind in ("schema", "choices") else form.text
    return {FORMS[form.kind]: text}


def scoring_body(prompt_ids: Sequence[int], labels: Iterable[Sequence[int]], model: str) -> Json:
    """The body that asks for the log-probabilities of each label as what follows the prompt."""
    return {
        "model": model,
        "prompt": [[*prompt_ids, *label] for label in labels],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "ignore_eos": True,
    }


def piece(choice: Mapping[str, Any], asked: Asked) -> Piece:
    """Read one choice of an answer, or of a chunk of one.

    Raises:
        ServingError: it lacks what was asked for, or vLLM gave the request up.
    """
    request, reason = asked.request, choice.get("finish_reason")
    try:
        if reason not in (None, "stop", "length"):
            raise ServingError(f"vLLM ended this request by itself ({reason}); send it again.")
        ids = tuple(choice["token_ids"] or ())
        told = choice.get("logprobs")
        logprobs = None if request.logprobs is None else token_logprobs(told or {}, ids, request.logprobs)
        scored = choice.get("prompt_logprobs") if request.prompt_logprobs is not None else None
        prompt = None if scored is None else prompt_logprobs(scored, asked.prompt_ids, request.prompt_logprobs or 0)
        if asked.limit == 0:
            return Piece("", (), () if logprobs is not None else None, reason and "length", prompt)
        return Piece(choice["text"], ids, logprobs, reason, prompt)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ServingError(f"vLLM's answer is not what its interface promises: {error!r}.") from error


def token_logprobs(told: Mapping[str, Any], ids: Sequence[int], alternatives: int) -> tuple[TokenLogprob, ...]:
    """The log-probabilities of the tokens `ids`, with so many alternatives, the likeliest first."""
    values, tops = told.get("token_logprobs") or (), told.get("top_logprobs") or ()
    if len(values) != len(ids) or len(tops) != len(ids):
        raise ValueError(f"{len(values)} log-probabilities for {len(ids)} tokens")
    return tuple(
        TokenLogprob(token, value, _likeliest(((_token(key), one) for key, one in top.items()), alternatives))
        for token, value, top in zip(ids, values, tops, strict=True)
    )


def prompt_logprobs(
    told: Sequence[Mapping[str, Any] | None], ids: Sequence[int], alternatives: int
) -> tuple[TokenLogprob, ...]:
    """The log-probabilities of a prompt's tokens; nothing precedes the first one."""
    if len(told) != len(ids):
        raise ValueError(f"{len(told)} log-probabilities for a prompt of {len(ids)} tokens")
    found = []
    for token, entry in zip(ids, told, strict=True):
        if entry is None:
            found.append(TokenLogprob(token, None))
            continue
        values = {int(key): float(one["logprob"]) for key, one in entry.items()}
        found.append(TokenLogprob(token, values[token], _likeliest(values.items(), alternatives)))
    return tuple(found)


def label_logprobs(
    choices: Sequence[Mapping[str, Any]], prompt_length: int, labels: Sequence[Sequence[int]]
) -> tuple[float, ...]:
    """The log-probability of each label, summed over its tokens, from the answer to `scoring_body`.

    Raises:
        ServingError: the answer lacks some.
    """
    try:
        by_index = {choice["index"]: choice["prompt_logprobs"] for choice in choices}
        return tuple(
            sum(
                float(by_index[index][prompt_length + place][str(token)]["logprob"])
                for place, token in enumerate(label)
            )
            for index, label in enumerate(labels)
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ServingError(f"vLLM's answer is not what its interface promises: {error!r}.") from error


def _likeliest(values: Iterable[tuple[int, float]], count: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(values, key=lambda pair: -pair[1])[:count])


def _token(key: str) -> int:
    if not key.startswith(TOKEN):
        raise ValueError(f"a token is called {key!r:.40}, not by its id")
    return int(key.removeprefix(TOKEN))
