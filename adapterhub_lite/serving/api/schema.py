"""What OpenAI's clients send, as strict models: unknown fields and what we cannot do are refused, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator

from adapterhub_lite.adapter_format.record import StrictModel


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


class TextPart(WireModel):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(WireModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "developer"]
    content: Text | tuple[TextPart, ...]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """Role and content as the chat template takes them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(WireModel):
    """What a stream carries beside its pieces."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(WireModel):
    """The only format of an answer there is."""

    type: Literal["text"] = "text"


class Sampling(WireModel):
    """What chat and completions have in common. Fields that only one value is served of are typed to that value."""

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

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: Any) -> Any:
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

    @property
    def wanted_tokens(self) -> int | None:
        """The limit on new tokens, by either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to report, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)]
    max_tokens: int | None = Field(None, ge=1, strict=True)
    logprobs: int | None = Field(None, ge=0, le=5, strict=True)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The limit on new tokens; 16 unless told, as OpenAI has it."""
        return self.max_tokens or 16

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as a tuple."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt


class AdapterCommand(StrictModel):
    """An admin's wish about one adapter, by reference: `name`, `name:3` or `name@alias`, never a path."""

    reference: Annotated[str, Field(max_length=200)]


class SplitCommand(StrictModel):
    """An admin's wish to send `share` of the requests for `reference` to `candidate`; a share of 0 ends it."""

    reference: Annotated[str, Field(max_length=200)]
    candidate: Annotated[str, Field(max_length=200)] = ""
    share: Annotated[float, Field(ge=0, le=1)]


class AliasCommand(StrictModel):
    """An admin's move of an alias; with `expect` only if it points there now (0: only if there is none)."""

    name: Annotated[str, Field(max_length=64)]
    alias: Annotated[str, Field(max_length=64)]
    version: int = Field(ge=1, lt=1_000_000_000)
    expect: int | None = Field(None, ge=0, lt=1_000_000_000)
