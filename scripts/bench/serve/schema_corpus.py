"""JSON schemas like those people publish: configurations, records of an API, forms, messages. Drawn from a seed."""

import random
from typing import Any

Schema = dict[str, Any]
WORDS = [
    "id", "name", "title", "status", "price", "amount", "currency", "email", "phone", "address", "city", "country",
    "zip", "created", "updated", "owner", "tags", "items", "count", "enabled", "version", "description",
    "priority", "color", "width", "height", "latitude", "longitude", "start", "end", "code", "message", "level",
    "user",
]  # fmt: skip
FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4", "hostname")
PATTERNS = (
    r"^[A-Z]{2}[0-9]{4}$",
    r"^#[0-9a-f]{6}$",
    r"^v[0-9]+\.[0-9]+$",
    r"^[a-z][a-z0-9_]{0,15}$",
    "^(low|mid|high)$",
)


class SchemaCorpus:
    """Draws schemas; every string in them is short, so that a model comes to an end."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self) -> Schema:
        """One whole schema, most of them objects."""
        draw = self._random
        kind = draw.random()
        if kind < 0.06:
            return self._tree()
        if kind < 0.12:
            whole: Schema = {"type": "array", "items": self._object(2), "minItems": 1, "maxItems": 3}
        elif kind < 0.18:
            whole = {"anyOf": [self._tagged(tag) for tag in draw.sample(WORDS, 3)]}
        elif kind < 0.24:
            first, second = self._object(1), self._object(1)
            for part in (first, second):
                part.pop("additionalProperties", None)
            whole = {"allOf": [first, second]}
        else:
            whole = self._object(3)
        if draw.random() < 0.3:
            whole |= {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": "Made up",
                "description": "A.",
            }
        return whole

    def _object(self, depth: int) -> Schema:
        draw = self._random
        names = draw.sample(WORDS, draw.randint(1, 5))
        found: Schema = {"type": "object", "properties": {name: self._value(depth - 1) for name in names}}
        found["required"] = [name for name in names if draw.random() < 0.7]
        found["additionalProperties"] = False
        return found

    def _value(self, depth: int) -> Schema:
        draw = self._random
        makers = [self._text, self._text, self._number, self._number, self._word, self._format, self._nullable]
        if depth > 0:
            makers += [self._list, lambda: self._object(depth), self._choice, self._pair, self._map]
        found: Schema = dict(draw.choice(makers)())
        if draw.random() < 0.2:
            found |= {"description": "What it is for.", "title": "A field"}
        return found

    def _text(self) -> Schema:
        draw = self._random
        if draw.random() < 0.3:
            return {"type": "string", "pattern": draw.choice(PATTERNS)}
        least = draw.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + draw.randint(1, 9)}

    def _number(self) -> Schema:
        draw = self._random
        low = draw.randint(-50, 50)
        return draw.choice([
            {"type": "integer", "minimum": low, "maximum": low + draw.randint(1, 500)},
            {"type": "number", "minimum": low, "exclusiveMaximum": low + 10},
            {"type": "integer", "multipleOf": draw.choice([2, 5, 10]), "minimum": 0, "maximum": 1000},
            {"type": "integer", "exclusiveMinimum": 0, "maximum": 99},
        ])  # fmt: skip

    def _word(self) -> Schema:
        draw = self._random
        return draw.choice([
            {"enum": draw.sample([*WORDS, 1, 2.5, None, True], 4)}, {"const": draw.choice(WORDS)}, {"type": "boolean"},
            {"type": "string", "enum": draw.sample(WORDS, 3)},
        ])  # fmt: skip

    def _format(self) -> Schema:
        return {"type": "string", "format": self._random.choice(FORMATS), "maxLength": 40}

    def _nullable(self) -> Schema:
        kind = self._random.choice(["integer", "boolean"])
        bounds = {"minimum": 0, "maximum": 9} if kind == "integer" else {}
        return {"type": [kind, "null"], **bounds}

    def _list(self) -> Schema:
        least = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self._value(0),
            "minItems": least,
            "maxItems": least + self._random.randint(1, 3),
        }

    def _pair(self) -> Schema:
        return {"type": "array", "prefixItems": [self._value(0), self._value(0)], "items": False, "minItems": 2}

    def _map(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2} | (
            {"patternProperties": {"^x[0-9]$": self._number()}, "additionalProperties": False}
            if self._random.random() < 0.5
            else {"propertyNames": {"type": "string", "pattern": "^[a-z]{1,6}$"}}
        )

    def _choice(self) -> Schema:
        return {"anyOf": [self._number(), self._text(), {"type": "null"}]}

    def _tagged(self, tag: str) -> Schema:
        body = self._object(1)
        body["properties"] = {"kind": {"const": tag}, **body["properties"]}
        body["required"] = ["kind", *body["required"]]
        return body

    def _tree(self) -> Schema:
        node = {
            "type": "object",
            "properties": {
                "v": self._number(),
                "below": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
        return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
