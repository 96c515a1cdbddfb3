"""OpenAI's format on the wire: requests as strict models, answers as functions over results, each with its receipt.

Unknown fields and what cannot be done are refused, never ignored.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.serving.api.dispatch import ResolvedModel
from adapterhub_lite.serving.engine.request import GenerationResult, TokenLogprob

Json = dict[str, Any]
Decode = Callable[[int], str]
MOST_PROMPTS = 16
# Fields of OpenAI's that clients send as null when they aren't used; with any other value they are refused.
UNUSED = frozenset({
    "audio", "function_call", "functions", "guided_json", "logit_bias", "metadata", "modalities", "parallel_tool_calls",
    "prediction", "prompt_cache_key", "reasoning_effort", "safety_identifier", "service_tier", "store", "tool_choice",
    "tools", "verbosity", "web_search_options",
})  # fmt: skip
# And values of them, and of ours, that ask for nothing: they count as not given.
ASKING_NOTHING: Mapping[str, tuple[object, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none",), "parallel_tool_calls": (True, False), "seed": (-1,),
    "logit_bias": ({},), "metadata": ({},), "modalities": (["text"],), "store": (False,), "top_k": (-1,),
    "service_tier": ("auto", "default"),
}  # fmt: skip
UNUSED_OF_MESSAGES = frozenset({"annotations", "audio", "function_call", "reasoning_content", "refusal", "tool_calls"})


def _encodable(text: str) -> str:
    # JSON can carry lone surrogates, which no tokenizer and no UTF-8 response can.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
ModelName = Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_encodable)]


class WireModel(StrictModel):
    """Unknown fields are refused. Not strict as a whole: JSON knows one kind of list; the numbers are, one by one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def without_nulls(data: Any, unused: Collection[str], known: Collection[str]) -> Any:
    """`data` without the fields that are null, where that means "not given"; an unknown field stays, to be refused."""
    if not isinstance(data, dict):
        return data
    return {
        key: value
        for key, value in data.items()
        if not (value is None and key in {*unused, *known}) and not _asks_nothing(key, value)
    }


def _asks_nothing(key: str, value: object) -> bool:
    return any(value == nothing and type(value) is type(nothing) for nothing in ASKING_NOTHING.get(key, ()))


class TextPart(WireModel):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(WireModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "developer"]
    content: Text | tuple[TextPart, ...]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:  # whatever JSON holds
        if isinstance(data, dict):
            # An answer of ours, or of another server, sent back as it was received.
            data = {
                key: value for key, value in data.items() if not (key in UNUSED_OF_MESSAGES and value in (None, []))
            }
        return without_nulls(data, (), {"name"})

    def plain(self) -> dict[str, str]:
        """Role, content and name as the chat template takes them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": content} | named


class StreamOptions(WireModel):
    """What a stream carries besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(WireModel):
    """The only format of an answer: text."""

    type: Literal["text"] = "text"


class Sampling(WireModel):
    """What chat and completions have in common. A field of which one value alone is supported has that value as type."""

    model: ModelName
    temperature: float = Field(1.0, ge=0, le=2, strict=True)
    top_p: float = Field(1.0, gt=0, le=1, strict=True)
    top_k: int = Field(0, ge=0, le=1_000_000, strict=True)
    repetition_penalty: float = Field(1.0, gt=0, le=100, strict=True)
    seed: int | None = Field(None, ge=0, lt=2**63, strict=True)
    stop: Text | Annotated[tuple[Text, ...], Field(max_length=16)] | None = None
    stream: bool = Field(False, strict=True)
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0, strict=True)
    frequency_penalty: float | None = Field(None, ge=0, le=0, strict=True)
    user: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:  # whatever JSON holds
        return without_nulls(data, UNUSED, cls.model_fields.keys() - {"model", "messages", "prompt"})

    @model_validator(mode="after")
    def _usage_of_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream too, or leave it out")
        return self

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if any(not text for text in ([stop] if isinstance(stop, str) else stop or ())):
            raise ValueError("a stop string is empty")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=1000)]
    max_tokens: int | None = Field(None, ge=1, strict=True)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)
    logprobs: bool = Field(False, strict=True)
    top_logprobs: int | None = Field(None, ge=0, le=20, strict=True)
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _alternatives_of_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same limit, and differ; give one")
        return self

    @property
    def token_limit(self) -> int | None:
        """The limit on new tokens, by either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | Annotated[tuple[Text, ...], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, strict=True)
    logprobs: int | None = Field(None, ge=0, le=5, strict=True)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @field_validator("prompt")
    @classmethod
    def _bounded_prompts(cls, prompt: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(prompt, str) and len(prompt) > MOST_PROMPTS:
            raise ValueError(f"a request has at most {MOST_PROMPTS} prompts, these are {len(prompt)}")
        return prompt

    @property
    def token_limit(self) -> int | None:
        """The limit on new tokens; 16 by default, as at OpenAI."""
        return self.max_tokens or 16

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as a tuple."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt


class AdapterCommand(StrictModel):
    """One adapter to load or unload, by reference: `name`, `name:3` or `name@alias`, never a path."""

    reference: Annotated[str, Field(max_length=200)]


class SplitCommand(StrictModel):
    """Send `share` of the requests for `reference` to `candidate`; a share of 0 ends it."""

    reference: Annotated[str, Field(max_length=200)]
    candidate: Annotated[str, Field(max_length=200)] = ""
    share: Annotated[float, Field(ge=0, le=1)]


class AliasCommand(StrictModel):
    """Point an alias at a version; with `expect` only if it points there now (0: only if there is none)."""

    name: Annotated[str, Field(max_length=64)]
    alias: Annotated[str, Field(max_length=64)]
    version: int = Field(ge=1, lt=1_000_000_000)
    expect: int | None = Field(None, ge=0, lt=1_000_000_000)


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
