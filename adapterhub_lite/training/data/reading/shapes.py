"""The shapes that rows come in, recognised by their keys, and brought to three: `messages`, `prompt`/`completion`, `text`.

Knows no file and no tokenizer. Whatever a chat template may read goes along; what cannot be used is refused by name.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from adapterhub_lite.errors import DataError

Turn = dict[str, Any]  # a turn holds whatever a template reads
Row = Mapping[str, Any]  # a row comes from a stranger's file
WANTED = (
    "`messages`, ShareGPT's `conversations`, Alpaca's `instruction` and `output`, `question` and `answer`, `prompt` and "
    "`response`, `prompt` and `completion`, or `text`"
)
# What goes along with a chat, for its template.
CHAT_KEYS = ("tools", "documents", "chat_template_kwargs")
# What a cell of these says where there are none.
NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null")
MEDIA = frozenset({"images", "image", "audio", "audios", "video", "videos"})
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
# (what is asked, what may go with it, the answer), each by its possible names.
QUESTION_PAIRS = (
    ("instruction", ("input", "context"), ("output", "response", "completion")),
    ("question", ("context",), ("answer", "response")),
    ("query", (), ("response", "answer")),
    ("prompt", (), ("response", "answer", "output")),
    ("input", (), ("output",)),
)
SHOWN = 60


@dataclass(frozen=True)
class Columns:
    """Which columns of a table make a row, where their names do not say it.

    `prompt` and `completion` name columns of raw text; `template` is a format text over columns ("Q: {question}") and
    makes the prompt where there is a completion column, or else the whole text. `ignore` names keys that are left out.
    """

    prompt: str | None = None
    completion: str | None = None
    template: str | None = None
    ignore: frozenset[str] = field(default=frozenset())


def normalized(where: str, row: Any, columns: Columns) -> tuple[dict[str, Any], set[str]]:
    """Return `row` in one of the three shapes, and the keys of it that were not used.

    Raises:
        DataError: it has none of the known shapes, or something in it cannot be used; names `where` and the key.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with {WANTED}, found {short(row)}.")
    media = sorted(key for key in MEDIA & set(row) if row[key] and key not in columns.ignore)
    if media:
        raise DataError(
            f"{where}: {media[0]!r} cannot be learned: only text is. Leave such rows out, or name the key in ignore_columns."
        )
    kept = {str(key): value for key, value in row.items() if key not in columns.ignore}
    made, used = by_columns(where, kept, columns) or by_name(where, kept)
    extras = {key: kept[key] for key in CHAT_KEYS if kept.get(key) not in NOTHING} if "text" not in made else {}
    for key, value in extras.items():
        made[key] = _json_value(where, key, value, dict if key == "chat_template_kwargs" else list)
    check_row(where, made, columns.ignore)
    for key, value in made.items():
        check_text(where, key, value if isinstance(value, str) else as_json(value))
    unused = {key for key in kept if key not in used and key not in CHAT_KEYS and kept[key] not in (None, "", [], {})}
    return made, unused


def by_columns(where: str, row: Row, columns: Columns) -> tuple[dict[str, Any], set[str]] | None:
    """The row that the named columns make, and the keys used; None where no column is named."""
    if columns.prompt is None and columns.completion is None and columns.template is None:
        return None
    used = {name for name in (columns.prompt, columns.completion) if name is not None}
    if columns.template is not None:
        used |= {name for _, name, _, _ in Formatter().parse(columns.template) if name}
    missing = sorted(used - set(row))
    if missing:
        raise DataError(f"{where}: there is no column {missing[0]!r}, found {_names(row)}.")
    if columns.template is None:
        if columns.prompt is None or columns.completion is None:
            raise DataError("Name both the prompt column and the completion column, or give a template.")
        return {"prompt": row[columns.prompt], "completion": row[columns.completion]}, used
    laid_out = columns.template.format_map(row)
    if columns.completion is None:
        return {"text": laid_out}, used
    return {"prompt": laid_out, "completion": row[columns.completion]}, used


def by_name(where: str, row: Row) -> tuple[dict[str, Any], set[str]]:
    """The row that its own keys make, and the keys used."""
    if "chosen" in row and "rejected" in row:
        raise DataError(
            f"{where}: 'chosen' and 'rejected' are pairs for preference training, which this is not. "
            "Give rows with the chosen answer alone."
        )
    for key in ("messages", "conversations", "conversation"):
        if key in row:
            turns = _json_value(where, key, row[key], list)
            made = [from_sharegpt(where, turn) for turn in turns]
            system, first = row.get("system"), made[0] if isinstance(made[0], Mapping) else {}
            if isinstance(system, str) and system and first.get("role") != "system":
                made.insert(0, {"role": "system", "content": system})
            # One that is no text, or that the chat has its own instead of, is not used, and is named as such.
            said = isinstance(made[0], Mapping) and made[0].get("content") == system
            return {"messages": made}, {key, "system"} if said else {key}
    if "prompt" in row and "completion" in row:
        pair = {key: list(row[key]) if isinstance(row[key], list) else row[key] for key in ("prompt", "completion")}
        return pair, {"prompt", "completion"}
    for asked, also, answers in QUESTION_PAIRS:
        answer = next((name for name in answers if name in row), None)
        if asked in row and answer is not None:
            return question_and_answer(where, row, asked, also, answer)
    if "text" in row:
        return {"text": row["text"]}, {"text"}
    raise DataError(
        f"{where}: expected {WANTED}, found {_names(row)}. Rename the keys, or name the columns (prompt_column and "
        "completion_column, or template)."
    )


def question_and_answer(
    where: str, row: Row, asked: str, also: Sequence[str], answer: str
) -> tuple[dict[str, Any], set[str]]:
    """Alpaca and its relatives as a chat; `system` and `history` ([question, answer] pairs) come before it."""
    turns: list[Turn] = []
    if row.get("system"):
        turns.append({"role": "system", "content": row["system"]})
    for pair in row.get("history") or []:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise DataError(f"{where}: expected [question, answer] pairs under 'history', found {short(pair)}.")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    more = next((name for name in also if row.get(name)), None)
    parts = [row[name] for name in (asked, more) if name is not None]
    for name, value in ((asked, row[asked]), (answer, row[answer]), *([(more, row[more])] if more else [])):
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: expected text under {name!r}, found {short(value)}.")
    turns += [{"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": row[answer]}]
    return {"messages": turns}, {asked, answer, "system", "history", *([more] if more else [])}


def from_sharegpt(where: str, turn: Any) -> Turn:
    """A turn of `role` and `content`, of one that says `from` and `value`."""
    if not isinstance(turn, Mapping) or "from" not in turn or "role" in turn:
        return dict(turn) if isinstance(turn, Mapping) else turn
    role = SHAREGPT_ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise DataError(
            f"{where}: {turn['from']!r} is no speaker of a conversation; expected one of {', '.join(SHAREGPT_ROLES)}."
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if role != "function_call":
        return {"role": role, "content": turn.get("value"), **rest}
    value = turn.get("value")
    several = isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    calls = _json_value(where, "value", value, list) if several else [_json_value(where, "value", value, dict)]
    made = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": made, **rest}


def _json_value(where: str, key: str, value: Any, kind: type) -> Any:
    """A list or an object, which files of flat columns hold as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: {key!r} holds text that is not JSON: {error}.") from error
    if not isinstance(value, kind) or not value:
        named = "list of turns with 'role' and 'content'" if key in ("messages", "conversations") else kind.__name__
        raise DataError(f"{where}: expected a {named} under {key!r}, found {short(value)}.")
    return value


def check_row(where: str, row: Row, ignore: frozenset[str]) -> None:
    """Refuse a row that lacks what is to be learned."""
    if "messages" in row:
        _check_turns(where, row["messages"], ignore)
        roles = [turn["role"] for turn in row["messages"]]
        if "assistant" not in roles:
            raise DataError(
                f"{where}: expected at least one turn with role 'assistant' to learn from, found roles {roles}. "
                "Add the answer, or remove the row."
            )
        return
    if "completion" in row and isinstance(row["prompt"], list) != isinstance(row["completion"], list):
        raise DataError(f"{where}: expected prompt and completion both as text or both as turns; make them alike.")
    for key in ("prompt", "completion", "text"):
        if key not in row:
            continue
        value = row[key]
        if key != "text" and isinstance(value, list):
            _check_turns(where, value, ignore)
        elif not isinstance(value, str) or not (value or key == "prompt"):
            raise DataError(f"{where}: expected text under {key!r}, found {short(value)}.")
    if isinstance(row.get("completion"), list) and not any(t["role"] == "assistant" for t in row["completion"]):
        raise DataError(f"{where}: expected a turn with role 'assistant' in the completion, to learn from.")


def _check_turns(where: str, turns: Any, ignore: frozenset[str]) -> None:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected a list of turns with 'role' and 'content', found {short(turns)}.")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError(f"{where}: expected turns with text under 'role' and 'content', found {short(turn)}.")
        here = f"{where}, turn {number}"
        for key in [key for key, value in turn.items() if value is None or key in ignore]:
            # Tables of one column per key fill up with None what a turn does not have.
            if key != "content":
                del turn[key]
        check_content(here, turn, ignore)
        if turn.get("tool_calls"):
            check_calls(here, turn["tool_calls"])
        if "weight" in turn:
            weight = turn["weight"]
            good = isinstance(weight, int | float) and math.isfinite(weight) and 0 <= weight <= 100
            if not good:
                raise DataError(f"{here}: 'weight' is {short(weight)}, expected a number from 0 to 100.")
        for key in ("train", "training"):
            if key in turn and not isinstance(turn[key], bool):
                raise DataError(f"{here}: {key!r} is {short(turn[key])}, expected true or false.")


def check_calls(here: str, calls: Any) -> None:
    """Refuse calls of tools that are none: what a template would make of them is not what was meant."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(calls, list) and isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{here}: expected a list of calls under 'tool_calls', each with a function's 'name' and 'arguments', found "
                f"{short(call)}."
            )
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str | Mapping):
            raise DataError(
                f"{here}: expected an object, or the JSON text of one, under 'arguments', found {short(arguments)}."
            )


def check_content(here: str, turn: Turn, ignore: frozenset[str]) -> None:
    """Refuse content that is no text, and leave of its parts the texts."""
    media = sorted(key for key in MEDIA & set(turn) if turn[key])
    if media:
        raise DataError(
            f"{here}: {media[0]!r} cannot be learned: only text is. Leave such rows out, or name the key in ignore_columns."
        )
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part for part in content if not (isinstance(part, Mapping) and part.get("type") in ignore)]
        for part in parts:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type", "?") if isinstance(part, Mapping) else short(part)
                raise DataError(f"{here}: content of the type {kind!r} cannot be learned: only text is.")
        # Other keys of a part are None where a table has a column for each.
        turn["content"] = [{"type": "text", "text": part["text"]} for part in parts]
    elif content is None:
        if not turn.get("tool_calls") and not turn.get("function_call"):
            raise DataError(
                f"{here}: expected turns with text under 'role' and 'content', found no content and no tool calls."
            )
        turn.pop("content", None)
    elif not isinstance(content, str):
        raise DataError(f"{here}: expected text under 'content', found {short(content)}.")


def as_json(value: Any) -> str:
    """A list or an object as JSON; dates, which parquet files hold, as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def check_text(where: str, key: str, text: str) -> None:
    """Refuse a text with half a character, as JSON can write it ("\\ud83d") and no file or tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise DataError(
            f"{where}: {key!r} holds half a character ({half}). Write the whole of it, or remove it."
        ) from error


def weight_of(turn: Mapping[str, Any]) -> float:
    """How much an assistant's turn counts in the loss: `weight`, 0 with `train` (or `training`) false, else 1."""
    if turn["role"] != "assistant" or turn.get("train") is False or turn.get("training") is False:
        return 0.0
    return float(turn.get("weight", 1.0))


def short(value: Any) -> str:
    """A value for an error message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


def _names(row: Row) -> str:
    return ", ".join(repr(str(key)) for key in row) or "no keys at all"
