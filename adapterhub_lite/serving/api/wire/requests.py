"""The bodies of requests in OpenAI's format. Unknown fields and what cannot be done are refused, never ignored."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import ConfigDict, Field, field_validator, model_validator

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.serving.api.chat.messages import ChatMessage, Tool, ToolChoice
from adapterhub_lite.serving.api.wire.fields import ModelName, Text, WireModel
from adapterhub_lite.serving.api.wire.meanings import with_meanings
from adapterhub_lite.serving.api.wire.sampling import Sampling, TokenId
from adapterhub_lite.serving.engine.request import GenerationResult

MOST_PROMPTS = 2048
MOST_CHOICES = 256
MOST_TOOLS = 128
# Arguments of the chat template that have a field of their own, or are nobody's to choose.
OWN_TEMPLATE_WORDS = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "documents",
    "messages", "return_dict", "tokenize", "tools",
})  # fmt: skip
T = TypeVar("T")
Several = Annotated[tuple[T, ...], Field(min_length=1)]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=1000)]
    max_tokens: int | None = Field(None, ge=0, strict=True)
    max_completion_tokens: int | None = Field(None, ge=0, strict=True)
    continue_final_message: bool = Field(False, strict=True)
    add_generation_prompt: bool | None = Field(None, strict=True)
    chat_template_kwargs: dict[Text, Any] = Field(default_factory=dict)
    logprobs: bool = Field(False, strict=True)
    top_logprobs: int | None = Field(None, ge=0, le=20, strict=True)
    tools: Annotated[tuple[Tool, ...], Field(max_length=MOST_TOOLS)] = ()
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = Field(True, strict=True)

    @field_validator("tools")
    @classmethod
    def _named_once(cls, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
        if len({tool.function.name for tool in tools}) < len(tools):
            raise ValueError("two tools have the same name")
        return tools

    @model_validator(mode="after")
    def _choice_of_tools(self) -> Self:
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice is for tools; give tools too, or leave it out")
        return self

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

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.add_generation_prompt == self.continue_final_message:
            raise ValueError(
                "the answer is either a new message or goes on with the last one: give "
                "continue_final_message: true with add_generation_prompt: false, or neither"
            )
        taken = sorted(self.chat_template_kwargs.keys() & OWN_TEMPLATE_WORDS)
        if taken:
            raise ValueError(f"chat_template_kwargs may not have {taken[0]!r}, which the request itself sets")
        return self

    @property
    def token_limit(self) -> int | None:
        """The limit on new tokens, by either of its names; None is whatever fits."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | Several[Text] | Several[TokenId] | Several[Several[TokenId]]
    max_tokens: int = Field(16, ge=0, strict=True)
    logprobs: int | None = Field(None, ge=0, le=20, strict=True)
    echo: bool = Field(False, strict=True)
    best_of: int | None = Field(None, ge=1, le=128, strict=True)
    suffix: None = None

    @model_validator(mode="after")
    def _bounded_prompts(self) -> Self:
        if len(self.prompts) * self.answers > MOST_PROMPTS:
            each = f" with {self.answers} answers each" if self.answers > 1 else ""
            raise ValueError(f"prompt has {len(self.prompts)} prompts{each}, at most {MOST_PROMPTS} make a request")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, fewer than the n = {self.n} answers that are wanted")
        if self.echo and self.truncate_prompt_tokens is not None:
            raise ValueError(
                "echo gives the prompt as it is, so truncate_prompt_tokens is not for it; shorten the prompt"
            )
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("best_of is not for streams: which answer is the best is known at the end")
        return self

    @property
    def answers(self) -> int:
        """How many answers are made for each prompt; the best `n` of them are given out."""
        return max(self.n, self.best_of or 1)

    def best(self, results: Sequence[GenerationResult]) -> list[GenerationResult]:
        """Of the answers to each prompt the `n` with the highest log-probability per token, in that order."""
        if self.answers == self.n:
            return list(results)
        best: list[GenerationResult] = []
        for start in range(0, len(results), self.answers):
            ranked = sorted(results[start : start + self.answers], key=_per_token, reverse=True)
            best += ranked[: self.n]
        return best if self.logprobs is not None else [replace(result, logprobs=None) for result in best]

    def options(self) -> dict[str, Any]:
        """As for every request; with `echo` the log-probabilities of the prompt are those of the answer."""
        options = super().options()
        if self.echo and self.logprobs is not None:
            options["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return options

    def source(self, prompt: str | tuple[int, ...]) -> dict[str, Any]:
        """A prompt and the log-probabilities that are asked for, as keywords of GenerationRequest."""
        told = self.logprobs if self.answers == self.n else self.logprobs or 0
        keyword = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        return {keyword: prompt, "logprobs": told}

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (self.prompt,)
        return cast("tuple[str | tuple[int, ...], ...]", self.prompt)


class ScoreRequest(WireModel):
    """POST /v1/score: how probable each of `choices` is as the beginning of the answer."""

    model: ModelName
    prompt: Text | Several[TokenId] | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=1000)] | None = None
    choices: Annotated[tuple[Annotated[Text, Field(min_length=1)], ...], Field(min_length=1, max_length=MOST_CHOICES)]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self

    def source(self) -> dict[str, Any]:
        """The prompt or the messages as keywords of GenerationRequest."""
        if self.messages is not None:
            return {"messages": [message.plain() for message in self.messages]}
        return {"prompt" if isinstance(self.prompt, str) else "prompt_token_ids": self.prompt}


def _per_token(result: GenerationResult) -> float:
    values = [one.logprob or 0.0 for one in result.logprobs or ()]
    return sum(values) / max(1, len(values))


class Command(StrictModel):
    """What an admin asks for; wholly strict."""

    model_config = ConfigDict(json_schema_extra=with_meanings)


class AdapterCommand(Command):
    """One adapter to load or unload, by reference: `name`, `name:3` or `name@alias`, never a path."""

    reference: Annotated[str, Field(max_length=200)]


class SplitCommand(Command):
    """Send `share` of the requests for `reference` to `candidate`; a share of 0 ends it."""

    reference: Annotated[str, Field(max_length=200)]
    candidate: Annotated[str, Field(max_length=200)] = ""
    share: Annotated[float, Field(ge=0, le=1)]


class AliasCommand(Command):
    """Point an alias at a version; with `expect` only if it points there now (0: only if there is none)."""

    name: Annotated[str, Field(max_length=64)]
    alias: Annotated[str, Field(max_length=64)]
    version: int = Field(ge=1, lt=1_000_000_000)
    expect: int | None = Field(None, ge=0, lt=1_000_000_000)
