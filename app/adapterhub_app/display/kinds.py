"""An answer shown as what it is: JSON to fold, SQL with its words marked, calls of tools as cards, reasoning aside.

Every text from a model goes through `shown`; the only markup is this module's own, `b`, `i`, `u`, `span`, `details` and
`summary`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from adapterhub_app.display.escape import shown

# Longer answers are shown as they are: nobody reads colours in them, and every update of the page carries them.
MOST_CHARACTERS = 8_000
# Objects and lists further inside are laid out, but fold with what they are in.
FOLDED_DEPTH = 4
_THOUGHT = re.compile(r"\s*<(think|thinking|reasoning)>(.*?)(?:</\1>|$)\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_SQL_BEGINS = re.compile(
    r"\s*(SELECT|WITH|INSERT\s+INTO|UPDATE|DELETE\s+FROM|CREATE\s+(TABLE|VIEW|INDEX))\b", re.IGNORECASE
)
_SQL_PARTS = re.compile(
    r"(?P<i>'(?:[^']|'')*')|(?P<u>\b\d+(?:\.\d+)?\b)|(?P<b>\b(?:SELECT|DISTINCT|FROM|WHERE|AND|OR|NOT|IN|IS|NULL|LIKE|BETWEEN|"
    r"JOIN|LEFT|RIGHT|INNER|OUTER|ON|AS|GROUP|ORDER|BY|HAVING|LIMIT|OFFSET|ASC|DESC|UNION|ALL|INSERT|INTO|VALUES|UPDATE|SET|"
    r"DELETE|CREATE|TABLE|VIEW|INDEX|WITH|CASE|WHEN|THEN|ELSE|END|EXISTS|COUNT|SUM|AVG|MIN|MAX)\b)",
    re.IGNORECASE,
)
_JSON_PARTS = re.compile(
    r'(?P<b>"(?:[^"\\]|\\.)*"(?=\s*:))|(?P<i>"(?:[^"\\]|\\.)*")|(?P<u>-?\b\d[\d.eE+-]*\b|\btrue\b|\bfalse\b|\bnull\b)'
)


@dataclass(frozen=True)
class Shown:
    """An answer for the page: `html` to show, `kind` in a word, `reasoning` to fold away, `calls` as (name, arguments)."""

    html: str
    kind: str = "text"
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def show_answer(text: str) -> Shown:
    """What an answer is, by itself: nothing but its text is looked at."""
    thought = _THOUGHT.match(text)
    reasoning, rest = (thought[2].strip(), text[thought.end() :]) if thought else ("", text)
    calls: list[tuple[str, str]] = []

    def take(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            name, arguments = str(call["name"]), call.get("arguments", call.get("parameters", {}))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return found[0]
        calls.append((name, json.dumps(arguments, ensure_ascii=False, indent=2)))
        return ""

    rest = _CALL.sub(take, rest) if len(rest) <= MOST_CHARACTERS else rest
    if calls:
        rest = rest.strip()
    html, kind = _marked(rest)
    return Shown(html, "call" if calls else kind, reasoning, tuple(calls))


def _marked(text: str) -> tuple[str, str]:
    if len(text) > MOST_CHARACTERS:
        return shown(text), "text"
    if text.strip()[:1] in ("{", "["):
        try:
            return f'<span class="code json">{json_tree(json.loads(text))}</span>', "JSON"
        except (ValueError, RecursionError):
            return shown(text), "text"
    if _SQL_BEGINS.match(text):
        return _coloured(_SQL_PARTS, text, "sql"), "SQL"
    return shown(text), "text"


def json_tree(value: Any, before: str = "", after: str = "", depth: int = 0) -> str:
    """A JSON value laid out, its objects and lists to fold, `FOLDED_DEPTH` of them in each other.

    `before` is the key that it stands under and `after` what follows it, both as text.
    """
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inner = [(f"{json.dumps(key, ensure_ascii=False)}: ", one) for key, one in value.items()]
    elif isinstance(value, list):
        inner = [("", one) for one in value]
    indent = "  " * depth
    if not inner or depth >= FOLDED_DEPTH:
        laid_out = json.dumps(value, ensure_ascii=False, indent=2).replace("\n", f"\n{indent}")
        return _marked_parts(_JSON_PARTS, f"{indent}{before}{laid_out}{after}")
    begin, end = "{}" if isinstance(value, dict) else "[]"
    last = len(inner) - 1
    lines = [json_tree(one, key, "," if number < last else "", depth + 1) for number, (key, one) in enumerate(inner)]
    # A `details` is a block, so a line ends on either side of it without a line break of its own.
    body = "".join(
        line if number == 0 or line.startswith("<details") or lines[number - 1].startswith("<details") else f"\n{line}"
        for number, line in enumerate(lines)
    )
    head = _marked_parts(_JSON_PARTS, f"{indent}{before}")
    gap = "" if lines[-1].startswith("<details") else "\n"
    return f"<details open><summary>{head}{begin}</summary>{body}{gap}{indent}{end}{after}</details>"


def _coloured(parts: re.Pattern[str], text: str, name: str) -> str:
    return f'<span class="code {name}">{_marked_parts(parts, text)}</span>'


def _marked_parts(parts: re.Pattern[str], text: str) -> str:
    pieces, at = [], 0
    for found in parts.finditer(text):
        tag = found.lastgroup or "span"
        pieces += [shown(text[at : found.start()]), f"<{tag}>{shown(found[0])}</{tag}>"]
        at = found.end()
    return "".join(pieces) + shown(text[at:])


def call_card(name: str, arguments: str) -> str:
    """A call of a tool: its name, and its arguments laid out."""
    body = _coloured(_JSON_PARTS, arguments, "json")
    return f'<span class="call"><span class="call-name">calls {shown(name)}</span>\n{body}</span>'


def token_strip(tokens: tuple[tuple[str, float], ...]) -> str:
    """The tokens of an answer, the less probable the stronger their ground; the probability stands behind each doubtful one."""
    pieces = []
    for text, probability in tokens:
        level = min(4, int((1 - probability) * 5))
        doubt = f"<i>{100 * probability:.0f} %</i>" if level else ""
        pieces.append(f'<span class="sure-{4 - level}">{shown(text)}{doubt}</span>')
    return f'<span class="tokens">{"".join(pieces)}</span>'
