"""How the JSON of clients is read: unknown fields are refused, and what asks for nothing counts as not given."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.serving.api.wire.meanings import with_meanings

# Fields of OpenAI's and vLLM's that clients send as null when they aren't used; with any other value they are refused.
UNUSED = frozenset({
    "audio", "bad_words", "function_call", "functions", "include_stop_str_in_output",
    "length_penalty", "metadata", "modalities", "parallel_tool_calls", "prediction", "priority", "prompt_cache_key",
    "reasoning_effort", "safety_identifier", "service_tier", "skip_special_tokens", "spaces_between_special_tokens",
    "store", "tool_choice", "tools", "use_beam_search", "verbosity", "web_search_options",
})  # fmt: skip
# And values of them, and of ours, that ask for nothing: they count as not given.
ASKING_NOTHING: Mapping[str, tuple[object, ...]] = {
    "tools": ([],), "functions": ([],), "seed": (-1,),
    "metadata": ({},), "modalities": (["text"],), "store": (False,), "top_k": (-1,), "service_tier": ("auto", "default"),
    "use_beam_search": (False,), "length_penalty": (1, 1.0), "skip_special_tokens": (True,), "priority": (0,),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,), "bad_words": ([],),
    "suffix": ("",), "allowed_token_ids": ([],),
}  # fmt: skip


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

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, json_schema_extra=with_meanings)


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
