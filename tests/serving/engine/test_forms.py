"""Whether a text is of a form: for JSON, what jsonschema says of the value, where nothing else stands around it."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.engine.forms import is_of_form
from adapterhub_lite.serving.engine.request import Form, schema_form

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 3},
        "b": {"type": ["integer", "null"], "minimum": -2, "maximum": 40},
        "c": {"type": "array", "items": {"enum": ["x", 1, True]}, "maxItems": 2},
    },
    "required": ["a"],
    "additionalProperties": False,
}
LEAVES: Any = st.sampled_from(["", "x", "äöü", "four", 1, 40, 41, -3, 1.5, True, None])
# In the order of the schema, which is the order that answers are held to.
VALUES = st.fixed_dictionaries({}, optional={"a": LEAVES, "b": LEAVES, "c": st.lists(LEAVES, max_size=3)}).map(
    lambda value: dict(sorted(value.items()))
)


@given(
    VALUES | LEAVES,
    st.sampled_from(["", " ", "\n\t"]),
    st.sampled_from(["", "\n", "}", " x"]),
    st.sampled_from([None, 1]),
)
def test_json_is_of_a_schema_exactly_where_jsonschema_says_so(value: Any, before: str, after: str, indent: Any) -> None:
    text = before + json.dumps(value, ensure_ascii=False, indent=indent) + after
    valid = Draft202012Validator(SCHEMA).is_valid(value) and after.strip() == ""
    assert is_of_form(schema_form(SCHEMA), text) == valid
    assert not is_of_form(schema_form(SCHEMA), text[: len(before) + 1] if isinstance(value, dict) else "")


@given(st.text("abc!", max_size=6))
def test_text_is_of_an_expression_exactly_where_it_matches_whole(text: str) -> None:
    assert is_of_form(Form("regex", "[ab]{1,3}c?!"), text) == (re.fullmatch("[ab]{1,3}c?!", text) is not None)


def test_a_form_that_cannot_be_enforced_is_refused_and_no_text_is_too_strange() -> None:
    with pytest.raises(ConfigurationError, match="cannot be"):
        is_of_form(schema_form({"type": "object", "unevaluatedProperties": {"not": {}}}), "{}")
    assert not is_of_form(schema_form({"type": "string"}), '"\ud800"')
