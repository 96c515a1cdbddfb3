"""Answers in OpenAI's format, as functions over the engine's results; each carries its receipt."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from adapterhub_lite.serving.api.dispatch import ResolvedModel
from adapterhub_lite.serving.engine.request import GenerationResult, TokenLogprob

Json = dict[str, Any]
Decode = Callable[[int], str]


def envelope(kind: str, request_id: str, model: str, resolved: ResolvedModel) -> Json:
    """What every object of an answer starts with; `kind` is OpenAI's `object`."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{request_id}", "object": kind, "created": int(time.time()), "model": model,
            "system_fingerprint": resolved.base[:16], "receipt": resolved.receipt()}  # fmt: skip


def usage(results: Sequence[GenerationResult]) -> Json:
    """Tokens read and written, over all answers of a request."""
    prompt = sum(result.usage.prompt_tokens for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_choice(result: GenerationResult, decode: Decode) -> Json:
    """The one choice of a chat answer."""
    message = {"role": "assistant", "content": result.text, "refusal": None}
    logprobs = chat_logprobs(result.logprobs, decode)
    return {"index": 0, "message": message, "finish_reason": result.finish_reason, "logprobs": logprobs}


def completion_choice(index: int, result: GenerationResult, decode: Decode) -> Json:
    """One choice of a completion."""
    logprobs = completion_logprobs(result.logprobs, decode)
    return {"index": index, "text": result.text, "finish_reason": result.finish_reason, "logprobs": logprobs}


def chat_piece(
    text: str | None, *, first: bool = False, reason: str | None = None, logprobs: Json | None = None
) -> Json:
    """The one choice of a piece of a streamed chat answer."""
    delta: Json = {"role": "assistant", "content": ""} if first else {}
    if text:
        delta["content"] = text
    return {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}


def completion_piece(text: str, *, reason: str | None = None, logprobs: Json | None = None) -> Json:
    """The one choice of a piece of a streamed completion."""
    return {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None, decode: Decode) -> Json | None:
    """Log-probabilities as chat has them."""
    if logprobs is None:
        return None

    def entry(token_id: int, logprob: float) -> Json:
        token = decode(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    content = [
        entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*other) for other in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Sequence[TokenLogprob] | None, decode: Decode) -> Json | None:
    """Log-probabilities as completions have them; of two tokens with the same text the likelier one is given."""
    if logprobs is None:
        return None
    tokens = [decode(item.token_id) for item in logprobs]
    offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
    top = [{decode(token_id): logprob for token_id, logprob in reversed(item.top)} for item in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
