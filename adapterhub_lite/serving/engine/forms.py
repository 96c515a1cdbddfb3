"""What form an answer may be given, as llguidance reads it, within limits that keep compiling short. Without torch."""

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.engine.request import Form

# The longest text of a form, in characters. Larger regular expressions and grammars take seconds and hundreds of MB.
MOST_CHARACTERS = {"schema": 128_000, "choices": 128_000, "regex": 4_000, "grammar": 64_000}
# What llguidance's own limits do not stop: sizes it unrolls, objects whose every property may come next, and `multipleOf`,
# of which all together cost a state of the lexer per unit of their product.
LARGEST = {"minItems": 1000, "maxItems": 10_000, "minLength": 10_000, "maxLength": 1_000_000}
MOST_PROPERTIES = 1000
MOST_MULTIPLES = 10_000
JSON_SPACES = " \t\n\r"


def compile_limits() -> LLParserLimits:
    """What a form may cost to compile and to follow: each unit of fuel is some 20 ns."""
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def grammar_of(form: Form) -> str:
    """The form as llguidance's grammar, not compiled yet.

    Raises:
        ConfigurationError: it is too large, or not what it should be.
    """
    if len(form.text) > MOST_CHARACTERS[form.kind]:
        raise ConfigurationError(
            f"{form.kind} has {len(form.text):,} characters; at most {MOST_CHARACTERS[form.kind]:,} can be compiled."
        )
    try:
        return _grammar(form)
    except ValueError as error:
        raise ConfigurationError(f"{form.kind} cannot be read: {error}") from None


def check_form(form: Form) -> None:
    """Refuse a form that no answer could be given, whatever the tokenizer.

    Raises:
        ConfigurationError: it is not valid, too large, or uses what cannot be enforced.
    """
    _, problems = LLMatcher.validate_grammar_with_warnings(grammar_of(form), limits=compile_limits())
    if problems:
        raise ConfigurationError(f"{form.kind} cannot be enforced: {in_words(problems)}")


def is_of_form(form: Form, text: str) -> bool:
    """Whether a text is an answer of the form, whole and with nothing after it; white space around JSON is no part of it.

    As answers are held to it: the properties of an object stand in the order of its schema.

    Raises:
        ConfigurationError: the form is not valid, too large, or uses what cannot be enforced.
    """
    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(form), log_level=0, limits=compile_limits())
    if matcher.is_error():
        raise ConfigurationError(f"{form.kind} cannot be enforced: {in_words([matcher.get_error()])}")
    held = list((text.strip(JSON_SPACES) if form.kind == "schema" else text).encode("utf-8", "surrogatepass"))
    return matcher.try_consume_tokens(held) == len(held) and matcher.is_accepting()


def in_words(problems: Sequence[str]) -> str:
    """What llguidance says, in one line."""
    return " ".join("; ".join(problems).replace("<non-verbose/>", "").split())[:500]


def _grammar(form: Form) -> str:
    if form.kind == "schema":
        _check_numbers(json.loads(form.text))
        # `lenient` would leave out what cannot be enforced; a schema may not ask for that either.
        return LLMatcher.grammar_from_json_schema(form.text, overrides={"lenient": False})
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.text)
    if form.kind == "choices":
        # One lexeme: as alternatives of a rule they would each be followed by themselves.
        texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(form.text))
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(texts))
    for found in re.finditer(r"%json\s*", form.text):
        _check_numbers(json.JSONDecoder().raw_decode(form.text, found.end())[0])
    return grammar_from("grammar", form.text)


def _check_numbers(schema: Any) -> None:  # whatever JSON holds
    """Refuse a schema that would be compiled for too long, with a ValueError that says why."""
    multiples = set()
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        left += value.values()
        numbers = {key: number for key, number in value.items() if isinstance(number, int | float)}
        for key, most in LARGEST.items():
            if numbers.get(key, 0) > most:
                raise ValueError(f"{key} is {value[key]}, at most {most} can be compiled")
        if len(value) > MOST_PROPERTIES:
            raise ValueError(f"an object has {len(value)} entries, at most {MOST_PROPERTIES} can be compiled")
        if "multipleOf" in numbers:
            digits = Decimal(str(numbers["multipleOf"])).as_tuple().digits
            multiples.add(int("".join(map(str, digits))))
    if math.prod(multiples) > MOST_MULTIPLES:
        raise ValueError(
            f"the multipleOf of a schema may have a product of at most {MOST_MULTIPLES}, without their point"
        )
