"""A chat as the texts that are learned of it, by its template: which characters the assistant writes, and how much they count.

Three ways, the first that is exact for a row is taken:

- *marks*: the template says by `{% generation %}` marks what the assistant writes.
- *whole*: the chat is laid out once. An assistant's turn is what the template adds to the chat before it, as it would be
  asked (`add_generation_prompt`), up to its end token.
- *per turn*: where a template lays out a turn differently once more turns follow (it drops earlier reasoning), each
  learned turn becomes an example of its own: the chat up to it, exactly as the model will be asked then.

Either way the tokens are those that the template itself renders (with the end token that some write only once the chat
goes on), and what of a row does not come out of it is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases.chat.bounded import render_bounded
from adapterhub_lite.bases.chat.template import GENERATION_MARK, render_chat, render_marked, template_of, words_of
from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.reading.shapes import SHAREGPT_ROLES, Turn, short, weight_of

WEIGHTS = frozenset({"weight", "train", "training"})
# Keys that keep books of a chat; a template need not read them.
BOOKKEEPING = frozenset({"id", "tool_call_id", "call_id", "name", "index", "refusal", "annotations", "timestamp"})
# Names of one thing: transformers gives a template each of them.
REASONING = ("reasoning_content", "reasoning", "thinking")
# A text that no template changes.
PROBE = "Lorem"
# By so many characters the end of a turn is found again once more turns follow.
SEEN_CHARACTERS = 8
THINK_TAGS = re.compile(r"</?think(?:ing)?>")
# A template that asks which of the two the arguments of a tool call are writes both down as they are.
READS_TEXT_ARGUMENTS = re.compile(r"arguments['\"\]]* is (?:not )?(?:string|mapping)|\+ *tool\S*arguments['\"\]]* *\+")


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a text that are learned, each token with `weight` in the loss."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """One text to be learned. `way` says how a chat was laid out; plain text is a "text" or a "completion".

    `prefill` is what the template adds when it asks, and that the row's answer does not begin with.
    """

    text: str
    spans: tuple[Span, ...]
    way: str
    prefill: str = ""


@dataclass(frozen=True)
class Chat:
    """Turns as a template reads them, how much each counts in the loss, and what goes along for the template."""

    turns: list[Turn]
    weights: tuple[float, ...]
    template: str
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def learned(self) -> list[int]:
        """The turns that are learned, by index."""
        return [index for index, weight in enumerate(self.weights) if weight > 0]


class ChatLayout:
    """Lays out chats by the template of one tokenizer.

    `ends` are the texts of the tokens that end an answer, `arguments` the template's arguments for every row, and
    `ignore` the keys that may be lost. `bounded_template` is one of a stranger, such as an adapter's, which takes the place of
    the tokenizer's and is laid out within limits. `unread` tells which bookkeeping keys the template did not read, and where first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[str],
        *,
        arguments: Mapping[str, Any] | None = None,
        ignore: frozenset[str] = frozenset(),
        bounded_template: str | None = None,
    ) -> None:
        self.tokenizer, self.ends, self.ignore = tokenizer, tuple(ends), ignore
        self.bounded_template = bounded_template
        self.arguments = dict(arguments or {})
        self.unread: dict[str, str] = {}
        self._read_kinds: dict[tuple[str, str], bool] = {}

    def examples(self, row: Mapping[str, Any], where: str, *, entire: bool = False) -> list[Example]:
        """The texts that are learned of a row with `messages`, or with turns under `prompt` and `completion`.

        Empty where no turn of it is to be learned. With `entire`, every turn is, and whatever the template adds.

        Raises:
            DataError: there is no template, it refuses the chat, or something of the chat does not come out of it.
        """
        template = self.bounded_template or template_of(self.tokenizer, row.get("tools"))
        if not template:
            raise DataError(
                f"{where}: the tokenizer has no chat template, so chats cannot be laid out. "
                "Give one (chat_template), or rows with prompt and completion."
            )
        try:
            chat = self.read(row, template, where)
            if entire:
                text = self._render(chat, len(chat.turns))
                all_of_it = [Example(text, (Span(0, len(text)),), "whole")]
                self.check_nothing_lost(chat, all_of_it, where)
                return all_of_it
            if not chat.learned():
                return []
            marked = self.bounded_template is None and GENERATION_MARK.search(template)
            found = self.marked(chat) if marked else None
            if found and next(self.lost(chat, found), None):
                found = None  # a turn by itself may keep what the whole of the chat leaves out
            found = found or self.whole_chat(chat) or self.per_turn(chat)
        except ValueError as error:
            raise DataError(f"{where}: the chat template refuses this row: {error}") from error
        self.check_nothing_lost(chat, found, where)
        return found

    def read(self, row: Mapping[str, Any], template: str, where: str) -> Chat:
        """The chat in keys that the template reads; what it does not read is refused, unless it may be lost."""
        words = words_of(template)
        arguments = {**self.arguments, **(row.get("chat_template_kwargs") or {})}
        if row.get("documents"):
            arguments["documents"] = row["documents"]
        given = {**arguments, "tools": row.get("tools")}
        unread = sorted(key for key, value in given.items() if value and key not in words and key not in self.ignore)
        if unread:
            raise DataError(_lost(where, unread[0]))
        before: list[Turn] = [] if "messages" in row else row["prompt"]
        turns = row["messages"] if "messages" in row else [*before, *row["completion"]]
        weights = tuple(weight_of(turn) if i >= len(before) else 0.0 for i, turn in enumerate(turns))
        arguments = {key: value for key, value in arguments.items() if key in words}
        tools = row.get("tools") if "tools" in words else None
        made = [self.read_turn(turn, words, f"{where}, turn {i}", where) for i, turn in enumerate(turns, start=1)]
        made = made if READS_TEXT_ARGUMENTS.search(template) else [with_parsed_arguments(turn) for turn in made]
        return Chat([self.content_as_read(turn, template) for turn in made], weights, template, tools, arguments)

    def read_turn(self, turn: Turn, words: frozenset[str], here: str, where: str) -> Turn:
        """The keys of a turn that the template reads."""
        speaker = turn["role"]
        meant = SHAREGPT_ROLES.get(speaker.lower(), speaker)
        if meant != speaker and (meant == "assistant" or (meant in ("user", "system") and speaker not in words)):
            raise DataError(f"{here}: {speaker!r} is no role that the chat template knows. Say {meant!r}.")
        kept: Turn = {}
        for key, value in turn.items():
            if key in WEIGHTS or (value in (None, "", [], {}) and key != "content"):
                continue
            if key in ("role", "content") or key in words or (key in REASONING and words.intersection(REASONING)):
                kept[key] = value
            elif key in BOOKKEEPING:
                self.unread.setdefault(key, where)
            elif key not in self.ignore:
                raise DataError(_lost(here, key))
        return kept

    def content_as_read(self, turn: Turn, template: str) -> Turn:
        """The turn with its content as text or as a list of parts, as the template reads it."""
        content = turn.get("content")
        if isinstance(content, str) and not self._reads("text", template) and self._reads("parts", template):
            return {**turn, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self._reads("parts", template):
            return {**turn, "content": "".join(part["text"] for part in content)}
        return turn

    def _reads(self, kind: str, template: str) -> bool:
        """Whether the template writes content of a kind down as it is; tried once, on a user's turn."""
        if (template, kind) not in self._read_kinds:
            content = PROBE if kind == "text" else [{"type": "text", "text": PROBE}]
            try:
                text = self._lay_out([{"role": "user", "content": content}], template)
            except ValueError:
                text = ""
            self._read_kinds[template, kind] = PROBE in text and "'type'" not in text and '"type"' not in text
        return self._read_kinds[template, kind]

    def _render(self, chat: Chat, count: int, *, ask: bool = False) -> str:
        return self._lay_out(chat.turns[:count], None, tools=chat.tools, arguments=chat.arguments, ask=ask)

    def _lay_out(self, turns: Sequence[Turn], template: str | None, **given: Any) -> str:
        if self.bounded_template is not None:
            return render_bounded(self.bounded_template, self.tokenizer, turns, **given)
        return render_chat(self.tokenizer, turns, template=template, **given)

    def marked(self, chat: Chat) -> list[Example] | None:
        """By the marks of the template; None where weights differ and nobody knows which mark is whose."""
        text, marks = render_marked(self.tokenizer, chat.turns, tools=chat.tools, arguments=chat.arguments)
        weights = [weight for turn, weight in zip(chat.turns, chat.weights, strict=True) if turn["role"] == "assistant"]
        if len(marks) != len(weights):
            if len(set(weights)) > 1 or not marks:
                return None  # nobody knows which mark is whose
            weights = weights[:1] * len(marks)
        spans = [Span(*mark, weight) for mark, weight in zip(marks, weights, strict=True) if weight > 0]
        first = chat.learned()[0]
        missing = self._beginning(chat, first, text)[1] if self._begins_answers(chat.template) else ""
        return [Example(text, tuple(spans), "marks", missing)]

    def _begins_answers(self, template: str) -> bool:
        """Whether asking writes something that a plain answer does not begin with; tried once."""
        if (template, "asked") not in self._read_kinds:
            question = self.content_as_read({"role": "user", "content": PROBE}, template)
            answer = self.content_as_read({"role": "assistant", "content": PROBE}, template)
            try:
                asked, whole = (
                    self._lay_out([question], template, ask=True),
                    self._lay_out([question, answer], template),
                )
            except ValueError:
                asked = whole = ""
            self._read_kinds[template, "asked"] = not whole.startswith(asked)
        return self._read_kinds[template, "asked"]

    def whole_chat(self, chat: Chat) -> list[Example] | None:
        """Laid out once; None where a turn is laid out differently once more turns follow."""
        count, learned = len(chat.turns), chat.learned()
        whole, prefill = self._render(chat, count), ""
        spans: list[Span] = []
        for index in learned:
            through = whole if index == count - 1 else self._render(chat, index + 1)
            if not whole.startswith(through):
                return None
            start, missing = self._beginning(chat, index, through)
            if spans and start < spans[-1].end:
                return None
            end = self._end(through, start)
            # Some templates end a turn with what begins the next one.
            if end == len(through) and not through.endswith(self.ends or ("",)):
                if index == count - 1:
                    whole += self._end_once_it_goes_on(chat, index, through)
                end += len(next((one for one in self.ends if whole.startswith(one, end)), ""))
            spans.append(Span(start, end, chat.weights[index]))
            prefill = prefill or missing
        return [Example(whole, tuple(spans), "whole", prefill)]

    def per_turn(self, chat: Chat) -> list[Example]:
        """One example for each learned turn, which ends with it."""
        found = []
        for index in chat.learned():
            through = self._render(chat, index + 1)
            start, missing = self._beginning(chat, index, through)
            end = self._end(through, start)
            if end == len(through) and not through.endswith(self.ends or ("",)):
                through += self._end_once_it_goes_on(chat, index, through)
                end = len(through)
            found.append(Example(through, (Span(start, end, chat.weights[index]),), "per turn", missing))
        return found

    def _end_once_it_goes_on(self, chat: Chat, index: int, through: str) -> str:
        """The end token that the template writes behind turn `index` only when another turn follows, as GLM's does."""
        role = "tool" if chat.turns[index].get("tool_calls") else "user"
        more = self.content_as_read({"role": role, "content": PROBE}, chat.template)
        try:
            longer = self._render(replace(chat, turns=[*chat.turns[: index + 1], more]), index + 2)
        except ValueError:
            return ""
        before, last = longer[: longer.rfind(PROBE)], through[-SEEN_CHARACTERS:]
        return next((one for one in self.ends if before[: max(before.rfind(one), 0)].endswith(last)), "")

    def _beginning(self, chat: Chat, index: int, through: str) -> tuple[int, str]:
        """Where in `through` turn `index` begins, which it ends with; and what asking adds that stands not there.

        Raises:
            ValueError: the template lays out the turns before it in another way once the turn is there.
        """
        if index == 0:
            # Nothing comes before it that a template could be asked to go on from.
            text = str(chat.turns[0].get("content") or "").strip()
            return max(through.find(text), 0), ""
        asked = self._render(chat, index, ask=True)
        if through.startswith(asked):
            return len(asked), ""
        start = shared_beginning(asked, through)
        if start == len(through) or not through.startswith(self._render(chat, index)):
            raise ValueError(f"it lays out the turns before turn {index + 1} in another way once that turn is there")
        return start, asked[start:]

    def _end(self, text: str, start: int) -> int:
        """Where a turn that begins at `start` and ends with `text` is over: after the first of the end tokens at its end.

        What a template writes after that (a line end, a second end token) nobody has to learn.
        """
        end, rest = len(text), text
        while (rest := rest.rstrip()) and (last := next((one for one in self.ends if rest.endswith(one)), None)):
            end, rest = len(rest), rest.removesuffix(last)
        return max(end, start)

    def check_nothing_lost(self, chat: Chat, examples: Sequence[Example], where: str) -> None:
        """Refuse a chat of which a text that decides its meaning does not come out of the template."""
        for index, key, text in self.lost(chat, examples):
            raise DataError(
                f"{where}, turn {index + 1}: the chat template leaves out {key} ({short(text)}), so it would be "
                f"lost. Take a template that writes it, or name {key.split('.')[0]} in ignore_columns."
            )

    def lost(self, chat: Chat, examples: Sequence[Example]) -> Iterator[tuple[int, str, str]]:
        """(turn, key, text) of what does not come out of the template and may not be lost."""
        texts = [example.text for example in examples]
        for index, turn in enumerate(chat.turns):
            named = turn["role"] != "assistant" or chat.weights[index] > 0
            for key, text in texts_of(turn) if named else ():
                stripped = text.strip()
                if key in self.ignore or any(stripped in one for one in texts):
                    continue
                # As JSON, or as Python where a template writes an object down as it is.
                json_forms = json.dumps(stripped), json.dumps(stripped, ensure_ascii=False)
                quoted = [form[1:-1] for form in (*json_forms, repr(stripped))]
                if not any(form in one for one in texts for form in quoted):
                    yield index, key, stripped


def shared_beginning(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _lost(here: str, key: str) -> str:
    return (
        f"{here}: the chat template does not read {key!r}, so it would be lost. Take a template that does, remove the key, "
        "or name it in ignore_columns."
    )


def texts_of(turn: Turn) -> Iterator[tuple[str, str]]:
    """The texts that decide what a turn means, with the key of each."""
    content = turn.get("content")
    parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    for part in parts:
        yield from (("content", piece) for piece in THINK_TAGS.split(part))
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
    if isinstance(reasoning, str):
        yield "reasoning", reasoning
    for call in turn.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield "tool_calls.name", function["name"]
            yield from (("tool_calls.arguments", text) for text in leaves(function.get("arguments")))


def leaves(value: Any) -> Iterator[str]:
    """The texts in a JSON value, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(one)


def with_parsed_arguments(turn: Turn) -> Turn:
    """Tool calls whose arguments are JSON text, as OpenAI's files have them, as the object that templates write as JSON."""
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
            try:
                parsed = {**inner, "arguments": json.loads(inner["arguments"] or "{}")}
            except ValueError as error:
                raise ValueError(f"the arguments of a tool call are not JSON ({error})") from error
            if not isinstance(parsed["arguments"], Mapping):
                raise ValueError(f"the arguments of a tool call are no object, but {short(inner['arguments'])}")
            call = {**call, "function": parsed} if "function" in call else parsed
        calls.append(call)
    return {**turn, "tool_calls": calls}
