"""Laying out a chat as a tokenizer's template does, once for training and serving. The renderer is transformers' sandbox."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.manifest import TEMPLATE_FILE as TEMPLATE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, Any]  # a turn holds whatever the template reads
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def template_of(tokenizer: "PreTrainedTokenizerBase", tools: object = None) -> str:
    """The template that a chat is laid out by; of several by name, the one for tools where there are some. "" is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("tool_use" if tools else "default") or template.get("default")
    return template or ""


def template_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the sha256 of the chat template that `tokenizer` carries, or of nothing where it has none."""
    return digest_of(str(tokenizer.chat_template or ""))


def digest_of(template: str) -> str:
    """The sha256 of a template's text, 64 hex digits."""
    return hashlib.sha256(template.encode()).hexdigest()


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    ask: bool = False,
    template: str | None = None,
) -> str:
    """The text of a chat; with `ask`, up to where the model begins its answer. `template` None is the tokenizer's own.

    A template of a stranger may compute for ever here: that is `bounded_template`'s to lay out.

    Raises:
        ValueError: the template refuses the chat; the text is the template's own.
    """
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tools=[dict(tool) for tool in tools] if tools else None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=ask,
            **(arguments or {}),
        )
    except Exception as error:  # a template raises whatever it asks for
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return str(text)


def render_marked(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat by a template with `{% generation %}` marks, and the (start, end) characters between them.

    Raises:
        ValueError: the template refuses the chat.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # Its annotation says text alone; it returns the texts and the places of the marks.
        rendered: Any = render_jinja_template(
            conversations=[[{key: value for key, value in turn.items() if value is not None} for turn in turns]],
            tools=[dict(tool) for tool in tools] if tools else None,
            chat_template=template_of(tokenizer, tools),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **(arguments or {})},
        )
    except Exception as error:  # a template raises whatever it asks for
        raise ValueError(f"{type(error).__name__}: {error}") from error
    texts, marks = rendered
    return str(texts[0]), [(start, end) for start, end in marks[0] if end > start]


@lru_cache(maxsize=64)
def words_of(template: str) -> frozenset[str]:
    """Every word of a template's source: a key of a row that is not among them is one that it cannot read."""
    return frozenset(re.findall(r"\w+", template))
