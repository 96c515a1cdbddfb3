"""What is wrong with a body, in words: the field, what it is, and what was wanted; pydantic's own wording stays inside."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_lite.serving.api.wire.fields import UNUSED

# By pydantic's type of error, with its context filled in.
WANTED = {
    "missing": "is missing",
    "extra_forbidden": "is not a field of this request",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "literal_error": "{expected}",
    "union_tag_invalid": "the type {expected_tags}",
    "union_tag_not_found": "an object with a type",
    "string_type": "text",
    "string_pattern_mismatch": "text that fits {pattern}",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
WHOLE = ("missing", "extra_forbidden")


def refusal(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """The text for a body that does not validate, and the name of the first wrong field; `errors` are pydantic's."""
    first = max(errors, key=lambda error: len(_path(error, body))) if _alternatives(errors, body) else errors[0]
    kind = first["type"]
    if kind == "json_invalid":
        # The place is an offset in the text and names no parameter.
        return f"The body is not JSON: {first['ctx']['error']}.", None
    path = _path(first, body)
    where = ".".join(map(str, path)) or None
    if kind == "value_error":
        text = first["msg"].removeprefix("Value error, ")
        return f"{where}: {text}." if where and where not in text else f"{text}.", where or _named(text, body)
    same = [error for error in errors if _path(error, body) == path and error["type"] not in WHOLE]
    if kind == "extra_forbidden" and path[-1:] and path[-1] in UNUSED:
        text = f"{where} is {_shown(first['input'])}, which cannot be done here; leave it out"
    elif kind in WHOLE:
        text = f"{where or 'The body'} {WANTED[kind]}"
    else:
        wanted = dict.fromkeys(WANTED.get(e["type"], "another value").format(**e.get("ctx", {})) for e in same)
        text = f"{where or 'The body'} is {_shown(first['input'])}, wanted {' or '.join(wanted)}"
    places = {_path(error, body) for error in errors}
    return text + (" (and more is wrong)." if len(places) > 1 else "."), where


def _alternatives(errors: Sequence[Mapping[str, Any]], body: Any) -> bool:
    """Whether the errors are those of a value that may be of several kinds: the one that came furthest says most."""
    return len({_path(error, body)[:1] for error in errors}) == 1 and len(errors) > 1


def _path(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in the body an error is: its place without the names of types that pydantic writes in between."""
    path: list[str | int] = []
    here = body
    for part in error["loc"][1:]:
        if (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        ):
            here = here[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(part)
    return tuple(path)


def _named(text: str, body: Any) -> str | None:
    """The field of the body that a text begins with, if it does."""
    return next((name for name in body if text.startswith(name)), None) if isinstance(body, dict) else None


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return "no JSON"
    return text if len(text) <= 60 else text[:57] + "..."
