"""Answers in OpenAI's format, as functions over the engine's results; each carries its receipt."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases.encoding import token_bytes
from adapterhub_lite.serving.api.chat.tool_calls import ChatDeltas
from adapterhub_lite.serving.api.dispatch import ResolvedModel
from adapterhub_lite.serving.engine.request import GenerationResult, TokenLogprob

Json = dict[str, Any]


@dataclass(frozen=True)
class Decode:
    """Spells tokens, each alone: its text, and the bytes it stands for, which a piece of a character has too."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, token_id: int) -> str:
        """The text of a token; a piece of a character is shown as "\N{REPLACEMENT CHARACTER}"."""
        # Tokens of an adapter's own are the base's tokenizer none.
        known = token_id < len(self.tokenizer)
        return str(self.tokenizer.decode([token_id])) if known else f"token_id:{token_id}"

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The bytes of a token; None where they cannot be told."""
        spelt = token_bytes(self.tokenizer, token_id) if token_id < len(self.tokenizer) else None
        return None if spelt is None else list(spelt)


def envelope(kind: str, request_id: str, model: str, resolved: ResolvedModel) -> Json:
    """What every object of an answer starts with; `kind` is OpenAI's `object`."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{request_id}", "object": kind, "created": int(time.time()), "model": model,
            "system_fingerprint": resolved.base[:16], "receipt": resolved.receipt()}  # fmt: skip


def usage(results: Sequence[GenerationResult], answers: int = 1) -> Json:
    """Tokens read and written, over all of a request; each prompt was given `answers` times, and is counted once.

    Of those read, `cached_tokens` were taken over from another request's beginning.
    """
    asked = [result.usage for result in results[::answers]]
    used = usage_of(sum(one.prompt_tokens for one in asked), sum(one.usage.completion_tokens for one in results))
    return used | {"prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in asked)}}


def usage_of(prompt: int, completion: int) -> Json:
    """Tokens read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_choice(index: int, result: GenerationResult, deltas: ChatDeltas, decode: Decode) -> Json:
    """One choice of a chat answer; `deltas` take it apart."""
    deltas.take(result.text, last=True)
    logprobs, reason = chat_logprobs(result.logprobs, decode), deltas.finish_reason(result)
    return {"index": index, "message": deltas.message(), "finish_reason": reason, "logprobs": logprobs}


def completion_choice(index: int, result: GenerationResult, decode: Decode, echo: str | None = None) -> Json:
    """One choice of a completion; `echo` is the text of the prompt where it comes first."""
    text, logprobs = result.text, result.logprobs
    if echo is not None:
        text = echo + text
        logprobs = None if logprobs is None else (*(result.prompt_logprobs or ()), *logprobs)
    choice = {"index": index, "text": text, "finish_reason": result.finish_reason}
    return choice | {"logprobs": completion_logprobs(logprobs, decode)}


def chat_piece(index: int, delta: Json, *, reason: str | None = None, logprobs: Json | None = None) -> Json:
    """One choice of a piece of a streamed chat answer."""
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}


def completion_piece(index: int, text: str, *, reason: str | None = None, logprobs: Json | None = None) -> Json:
    """One choice of a piece of a streamed completion."""
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None, decode: Decode) -> Json | None:
    """Log-probabilities as chat has them."""
    if logprobs is None:
        return None

    def entry(token_id: int, logprob: float | None) -> Json:
        return {"token": decode(token_id), "logprob": logprob, "bytes": decode.bytes_of(token_id)}

    content = [
        entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*other) for other in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Sequence[TokenLogprob] | None, decode: Decode, *, offset: int = 0) -> Json | None:
    """Log-probabilities as completions have them, for a text that begins at `offset`.

    Of two tokens with the same text the likelier one is given.
    """
    if logprobs is None:
        return None
    tokens = [decode(item.token_id) for item in logprobs]
    top = [{decode(token): value for token, value in reversed(item.top)} for item in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [None if item.logprob is None else one for item, one in zip(logprobs, top, strict=True)],
        "text_offset": [offset + length for length in accumulate(map(len, tokens), initial=0)][: len(tokens)],
    }


def prompt_logprobs(logprobs: Sequence[TokenLogprob] | None, decode: Decode) -> list[Json | None] | None:
    """The prompt's log-probabilities as vLLM has them: by token id, the alternatives and then the token itself."""
    if logprobs is None:
        return None

    def entries(item: TokenLogprob) -> Json:
        values = dict([*item.top, (item.token_id, item.logprob)])
        return {str(token): {"logprob": value, "decoded_token": decode(token)} for token, value in values.items()}

    return [None if item.logprob is None else entries(item) for item in logprobs]


def score(choices: Sequence[str], result: GenerationResult) -> list[Json]:
    """The choices with their log-probabilities, and their probabilities among each other."""
    logprobs = result.label_logprobs or ()
    weights = [math.exp(value - max(logprobs)) for value in logprobs]
    return [
        {"index": index, "text": text, "logprob": value, "probability": weight / sum(weights)}
        for index, (text, value, weight) in enumerate(zip(choices, logprobs, weights, strict=True))
    ]


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
