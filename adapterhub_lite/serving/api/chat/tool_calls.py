"""Chats with tools: what the template and the engine are asked, and the calls and the reasoning of what they answer.

How the model writes its calls is its family's own way (`bases/chat/call_form`); a call that has to be made is written by a
grammar, so that its arguments follow their schema.
"""

import json
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases.chat.answer_reader import AnswerReader, Piece
from adapterhub_lite.bases.chat.bounded import render_bounded
from adapterhub_lite.bases.chat.call_form import AnswerForm, Tools, answer_form, may_reason, without_tools
from adapterhub_lite.bases.chat.template import Turn, render_chat, template_digest, template_of
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.adapters.sources import AdapterStore, RegistrySource
from adapterhub_lite.serving.adapters.split import parse_blend
from adapterhub_lite.serving.api.chat.messages import ChatMessage, Tool, ToolChoice, conversation
from adapterhub_lite.serving.api.chat.tool_grammar import call_grammar, special_tokens, text_grammar
from adapterhub_lite.serving.api.dispatch import ResolvedModel
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.errors import ApiRefusal
from adapterhub_lite.serving.engine.request import GenerationResult

Json = dict[str, Any]
MOST_FORMS = 128


class AnswerForms:
    """How the answers of each model are written, read off its chat template once. Thread-safe."""

    def __init__(self, engine: Engine, store: AdapterStore) -> None:
        self._engine, self._source = engine, RegistrySource(store)
        self._known: OrderedDict[tuple[str | None, str, str], AnswerForm] = OrderedDict()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's."""
        return self._engine.tokenizer

    @cached_property
    def special(self) -> Mapping[str, int]:
        """The tokens that the tokenizer has beside its vocabulary, by their text."""
        return special_tokens(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _digest(self) -> str:
        return template_digest(self.tokenizer)

    def of(self, resolved: ResolvedModel, arguments: Mapping[str, Any]) -> AnswerForm:
        """The form of the answers of a model whose template gets these arguments.

        Raises:
            BaseMismatchError: its adapters have no chat template in common.
            ConfigurationError: the template refuses the plainest chat.
        """
        template, prefill = self._template(resolved)
        key = (template, prefill, json.dumps(arguments, sort_keys=True, default=str))
        if key not in self._known:
            self._known[key] = self._read(template, prefill, arguments)
            while len(self._known) > MOST_FORMS:
                self._known.popitem(last=False)
        return self._known[key]

    def may_reason(self, resolved: ResolvedModel) -> bool:
        """Whether an answer may hold more than text without being asked for it."""
        template, _ = self._template(resolved)
        own = template is None and getattr(self.tokenizer, "response_template", None) is not None
        return own or may_reason(template or template_of(self.tokenizer))

    def _template(self, resolved: ResolvedModel) -> tuple[str | None, str]:
        """The template that a model's adapters bring along, None for the base's, and what of it their answers leave out."""
        pieces = parse_blend(resolved.reference) if resolved.reference is not None else ()
        found = FoundAdapters(tuple(self._source.locate(piece.reference) for piece in pieces))
        return found.template(self._digest), found.prefill()

    def _read(self, template: str | None, prefill: str, arguments: Mapping[str, Any]) -> AnswerForm:
        tokenizer = self.tokenizer

        def render(turns: Sequence[Turn], tools: Tools, ask: bool) -> str:
            if template is None:
                text = render_chat(tokenizer, turns, tools=tools, arguments=arguments, ask=ask)
            else:
                text = render_bounded(template, tokenizer, turns, tools=tools, arguments=arguments, ask=ask)
            return text.removesuffix(prefill) if ask else text

        source = template_of(tokenizer, True) if template is None else template
        own = getattr(tokenizer, "response_template", None) if template is None else None
        try:
            return answer_form(source, render, own)
        except ValueError as error:
            raise ConfigurationError(f"The chat template refused the messages: {error}") from error

    def tells_apart(self, form: AnswerForm) -> bool:
        """Whether what an answer is taken apart by are tokens that its text would leave out."""
        told = json.dumps(
            [form.call.tag, form.call.end_tag, form.reasoning, form.response_template], ensure_ascii=False
        )
        return form.harmony or any(token in told for token in self.tokenizer.all_special_tokens)


@dataclass(frozen=True)
class ChatPlan:
    """A chat as the engine is asked it, and how its answer is read. `read` None: the answer is its text."""

    messages: Sequence[Json]
    tools: Tools = ()
    template_arguments: Mapping[str, Any] | None = None
    grammar: str | None = None
    read: AnswerForm | None = None
    offered: Tools = ()
    special_tokens: bool = False

    @classmethod
    def of(
        cls,
        forms: AnswerForms,
        resolved: ResolvedModel,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        arguments: Mapping[str, Any] | None = None,
        choice: str | ToolChoice = "auto",
        several: bool = True,
        form: Mapping[str, Any] | None = None,
    ) -> "ChatPlan":
        """Plan a chat. `choice` and `several` are `tool_choice` and `parallel_tool_calls`, `form` that of the text.

        Raises:
            ApiRefusal: the tool to call is not among the tools, or the call cannot be forced.
        """
        turns, plain = conversation(messages), [tool.plain() for tool in tools]
        if isinstance(choice, ToolChoice):
            name = choice.function.name
            if all(tool.function.name != name for tool in tools):
                raise ApiRefusal(
                    400, f"tool_choice: {name!r} is not among the tools.", "invalid_value", param="tool_choice"
                )
        if not tools and not any(turn.get("tool_calls") for turn in turns) and not forms.may_reason(resolved):
            return cls(turns, template_arguments=arguments)
        written = forms.of(resolved, arguments or {})
        # Without a choice the tools are still told: an earlier call reads oddly otherwise.
        offered = [] if choice == "none" else plain
        if offered and written.call.kind == "unknown" and written.response_template is None:
            reason = (
                "How this model's chat template writes a call is not known, so none could be read. Ask without tools."
            )
            raise ApiRefusal(400, reason, "invalid_value", param="tools")
        grammar = None
        strict = any(tool.function.strict for tool in tools)
        if offered and (choice != "auto" or strict or form or not several):
            named = choice.function.name if isinstance(choice, ToolChoice) else None
            chosen = [tool for tool in offered if named in (None, tool["function"]["name"])]
            several = several and named is None
            text = None if choice != "auto" else dict(form or {})
            grammar = call_grammar(written, chosen, forms.special, several=several, text=text)
        elif form and written.in_reasoning:
            grammar = text_grammar(written, forms.special, form)
        if not written.reads_tools:
            turns, plain = without_tools(turns, plain), []
        read = written if offered or not written.plain else None
        return cls(turns, plain, arguments, grammar, read, offered, read is not None and forms.tells_apart(written))

    def asked(self) -> Json:
        """The keywords of GenerationRequest that this is asked with."""
        asked: Json = {"messages": self.messages, "tools": self.tools, "special_tokens": self.special_tokens}
        asked |= {} if not self.template_arguments else {"chat_template_kwargs": self.template_arguments}
        return asked | ({} if self.grammar is None else {"grammar": self.grammar})

    def reader(self) -> AnswerReader | None:
        """What takes the answer apart."""
        return None if self.read is None else AnswerReader(self.read, self.offered)


def length_of(messages: Sequence[Mapping[str, Any]], tools: Tools) -> int:
    """Characters of a conversation with its tools."""
    told = [[turn.get("tool_calls"), turn.get("reasoning_content")] for turn in messages if len(turn) > 2]
    return sum(len(turn["content"]) for turn in messages) + len(json.dumps([told, list(tools)]))


class ChatDeltas:
    """The pieces of one answer as OpenAI's deltas, and the whole message that they make."""

    def __init__(self, plan: ChatPlan) -> None:
        self._reader = plan.reader()
        self._pieces: list[Piece] = []
        self._ids: list[str] = []

    def feed(self, text: str, *, last: bool = False) -> list[Json]:
        """Deltas for some more of the answer."""
        return [self._delta(piece) for piece in self.take(text, last=last)]

    def take(self, text: str, *, last: bool = False) -> list[Piece]:
        """The pieces of some more of the answer."""
        if self._reader is None:
            pieces = [Piece("text", text)] if text else []
        else:
            pieces = self._reader.feed(text) + (self._reader.finish() if last else [])
        self._pieces += pieces
        self._ids += [f"call_{uuid.uuid4().hex[:24]}" for piece in pieces if piece.kind == "call"]
        return pieces

    def finish_reason(self, result: GenerationResult) -> str:
        """OpenAI's `finish_reason`; that of an answer that was cut off in a call stays `length`."""
        return "tool_calls" if self._ids and result.finish_reason == "stop" else result.finish_reason

    def message(self) -> Json:
        """The whole message."""
        found: dict[str, str] = {"text": "", "reasoning": ""}
        calls: list[Json] = []
        for piece in self._pieces:
            if piece.kind == "call":
                function = {"name": piece.text, "arguments": ""}
                calls.append({"id": self._ids[piece.index], "type": "function", "function": function})
            elif piece.kind == "arguments":
                calls[piece.index]["function"]["arguments"] += piece.text
            else:
                found[piece.kind] += piece.text
        message: Json = {"role": "assistant", "content": found["text"], "refusal": None}
        if calls:
            message |= {"content": found["text"] or None, "tool_calls": calls}
        return message | ({"reasoning_content": found["reasoning"]} if found["reasoning"] else {})

    def _delta(self, piece: Piece) -> Json:
        if piece.kind == "text":
            return {"content": piece.text}
        if piece.kind == "reasoning":
            return {"reasoning_content": piece.text}
        if piece.kind == "arguments":
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        function = {"name": piece.text, "arguments": ""}
        call = {"index": piece.index, "id": self._ids[piece.index], "type": "function", "function": function}
        return {"tool_calls": [call]}
