"""The bodies of requests in OpenAI's format. Unknown fields and what cannot be done are refused, never ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.serving.api.sampling import Sampling
from adapterhub_lite.serving.api.wire import Text, WireModel, without_nulls

MOST_PROMPTS = 16
UNUSED_OF_MESSAGES = frozenset({"annotations", "audio", "function_call", "reasoning_content", "refusal", "tool_calls"})


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


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=1000)]
    max_tokens: int | None = Field(None, ge=1, strict=True)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)
    logprobs: bool = Field(False, strict=True)
    top_logprobs: int | None = Field(None, ge=0, le=20, strict=True)

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
