"""What chat and completions have in common on the wire: how tokens are chosen, and which form the answer has."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.api.wire.fields import UNUSED, ModelName, Text, WireModel, without_nulls

Json = dict[str, Any]
JsonSchema = dict[str, Any]
Choices = Annotated[tuple[Text, ...], Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=300_000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
# Fields that GenerationRequest has too.
AS_THEY_ARE = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "allowed_token_ids", "stop_token_ids", "ignore_eos", "min_tokens", "truncate_prompt_tokens", "prompt_logprobs",
)  # fmt: skip
ANY_OBJECT: JsonSchema = {"type": "object"}


class StreamOptions(WireModel):
    """What a stream carries besides the text: the usage in a last event, and so far in each."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class TextFormat(WireModel):
    """Any text, also of an adapter that was kept with a schema."""

    type: Literal["text"]


class JsonObjectFormat(WireModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(WireModel):
    """A JSON schema with its name; it is enforced whether `strict` or not."""

    name: Text
    description: Text | None = None
    json_schema: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(WireModel):
    """JSON after a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(WireModel):
    """The form of an answer as vLLM has it: one of these."""

    json_schema: JsonSchema | Text | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None


class Sampling(WireModel):
    """What chat and completions have in common."""

    model: ModelName
    temperature: float = Field(1.0, ge=0, le=2, strict=True)
    top_p: float = Field(1.0, gt=0, le=1, strict=True)
    top_k: int = Field(0, ge=0, le=1_000_000, strict=True)
    min_p: float = Field(0.0, ge=0, le=1, strict=True)
    repetition_penalty: float = Field(1.0, gt=0, le=100, strict=True)
    seed: int | None = Field(None, ge=0, lt=2**63, strict=True)
    stop: Text | Annotated[tuple[Text, ...], Field(max_length=16)] | None = None
    stream: bool = Field(False, strict=True)
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128, strict=True)
    presence_penalty: float = Field(0.0, ge=-2, le=2, strict=True)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, strict=True)
    logit_bias: dict[TokenText, Bias] = Field(default_factory=dict, max_length=1024)
    allowed_token_ids: TokenIds | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] = ()
    ignore_eos: bool = Field(False, strict=True)
    min_tokens: int = Field(0, ge=0, strict=True)
    truncate_prompt_tokens: int | None = Field(None, ge=1, strict=True)
    prompt_logprobs: int | None = Field(None, ge=0, le=20, strict=True)
    user: Text | None = None
    adapter_id: ModelName | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

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
    def answers(self) -> int:
        """How many answers are made for each prompt."""
        return self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def options(self) -> Json:
        """How tokens are chosen and what the answer looks like, as keywords of GenerationRequest.

        Raises:
            ConfigurationError: several forms, or a schema that is not a JSON object.
        """
        options: Json = {name: getattr(self, name) for name in AS_THEY_ARE}
        options["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        options["any_form"] = isinstance(self.response_format, TextFormat)
        return {**options, "stop": self.stops, **self.form()}

    def form(self) -> Json:
        """The form of the answer as keywords of GenerationRequest; empty where any text will do."""
        asked: list[tuple[str, Any]] = [
            ("schema", self.guided_json),
            ("regex", self.guided_regex),
            ("choices", self.guided_choice),
            ("grammar", self.guided_grammar),
        ]
        outputs, response = self.structured_outputs, self.response_format
        if outputs is not None:
            asked += [
                ("schema", outputs.json_schema),
                ("schema", ANY_OBJECT if outputs.json_object else None),
                ("regex", outputs.regex),
                ("choices", outputs.choice),
                ("grammar", outputs.grammar),
            ]
        if isinstance(response, JsonSchemaFormat):
            asked.append(("schema", response.json_schema.json_schema))
        elif isinstance(response, JsonObjectFormat):
            asked.append(("schema", ANY_OBJECT))
        given = [(kind, value) for kind, value in asked if value is not None]
        if len(given) > 1:
            raise ConfigurationError("The answer's form is given more than once. Give one.")
        return {kind: _schema(value) if kind == "schema" else value for kind, value in given}


def _schema(value: Json | str) -> Json:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"The schema is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigurationError("The schema is not a JSON object.")
    return value
