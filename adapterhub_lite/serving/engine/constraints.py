"""Answers of a given form: a JSON schema, a regular expression, choices or a grammar, as masks over tokens.

By llguidance, an Earley parser over a lexer of derivatives. A form is compiled on the caller's thread, before the request
is queued, within limits of size, time and memory. Which tokens may come next is computed on a thread of its own, while
the model computes the logits that these are chosen from.
"""

import json
import math
import re
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.engine.request import Form

# The longest text of a form, in characters. Larger regular expressions and grammars take seconds and hundreds of MB.
MOST_CHARACTERS = {"schema": 128_000, "choices": 128_000, "regex": 4_000, "grammar": 64_000}
# What llguidance's own limits do not stop: sizes it unrolls, objects whose every property may come next, and `multipleOf`,
# of which all together cost a state of the lexer per unit of their product.
LARGEST = {"minItems": 1000, "maxItems": 10_000, "minLength": 10_000, "maxLength": 1_000_000}
MOST_PROPERTIES = 1000
MOST_MULTIPLES = 10_000

# Between two parts of JSON: a line's end and its indentation. Without a bound a model may write spaces for ever.
MOST_SPACES = 24
WHITE_SPACE = b" \t\n\r"


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


class JsonSpaces:
    """Follows a JSON text and counts the white space at its end, outside of strings."""

    def __init__(self) -> None:
        self.count = 0
        self._in_string = self._escaped = False

    def take(self, text: bytes) -> None:
        """Go on with the next bytes."""
        for byte in text:
            if self._in_string:
                self._in_string = byte != ord('"') or self._escaped
                self._escaped = byte == ord("\\") and not self._escaped
            else:
                self.count = self.count + 1 if byte in WHITE_SPACE else 0
                self._in_string = byte == ord('"')


class Constraint:
    """The form of one answer, followed token by token."""

    def __init__(
        self,
        matcher: LLMatcher,
        ends: Collection[int],
        tokens: "TokenBytes",
        threads: ThreadPoolExecutor,
        json_text: bool,
    ) -> None:
        self._matcher, self._tokens, self._threads = matcher, tokens, threads
        self._ends = torch.tensor(sorted(ends), dtype=torch.long)
        self._spaces = JsonSpaces() if json_text else None
        self._next: Future[tuple[torch.Tensor, bool]] = threads.submit(self._compute)

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Which tokens may come next (vocabulary,) bool; an end token where the answer may end here.

        Raises:
            ConfigurationError: the form is too complex to be followed any further.
        """
        known, may_end = self._next.result()
        allowed = known[:vocabulary]
        if known.shape[0] < vocabulary:
            allowed = torch.cat((known, torch.zeros(vocabulary - known.shape[0], dtype=torch.bool)))
        if may_end:
            allowed[self._ends] = True
        return allowed

    @property
    def may_end(self) -> bool:
        """Whether the answer is of the form as it stands."""
        return self._next.result()[1]

    def take(self, token: int) -> bool:
        """Go on with a token that was allowed; False when the answer is whole and nothing can follow."""
        if not self._matcher.consume_token(token):
            raise ConfigurationError(self._too_complex())
        if self._matcher.is_stopped():
            return False
        if self._spaces is not None:
            self._spaces.take(self._tokens.view.decode_bytes([token]))
        self._next = self._threads.submit(self._compute)
        return True

    def _compute(self) -> tuple[torch.Tensor, bool]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ConfigurationError(self._too_complex())
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._tokens.view.vocab_size]).bool()
        allowed[self._tokens.ends] = False
        if self._spaces is not None and self._spaces.count >= MOST_SPACES:
            allowed &= ~self._tokens.spaces
        return allowed, self._matcher.is_accepting()

    def _too_complex(self) -> str:
        return f"The answer cannot follow its form any further, which is too complex: {_words(self._matcher)}"


class TokenBytes:
    """What llguidance knows of a tokenizer: its `view`, which tokens begin with white space, and what it takes for ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigurationError("Answers of this base cannot be given a form: its tokenizer has no fast version.")
        try:
            self.view: LLTokenizer = from_tokenizer(tokenizer, eos_token=ends or None)
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"Answers of this base cannot be given a form: which bytes its tokens stand for is not known ({error})."
            ) from error
        starts = (self.view.decode_bytes([token])[:1] for token in range(self.view.vocab_size))
        self.spaces = torch.tensor([start in (b" ", b"\t", b"\n", b"\r") for start in starts])
        self.ends = torch.tensor(sorted(self.view.eos_tokens), dtype=torch.long)


class ConstraintCompiler:
    """Compiles forms for the tokens of one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, sorted(ends)
        self._lock = threading.Lock()
        self._made: TokenBytes | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="adapterhub-masks")

    def compile(self, form: Form, ends: Collection[int]) -> Constraint:
        """Return what follows one answer of this form, which may end with one of the tokens `ends`.

        Raises:
            ConfigurationError: the form is not valid, too large, or uses what cannot be enforced.
        """
        if len(form.text) > MOST_CHARACTERS[form.kind]:
            raise ConfigurationError(
                f"{form.kind} has {len(form.text):,} characters; at most {MOST_CHARACTERS[form.kind]:,} can be compiled."
            )
        try:
            grammar = _grammar(form)
        except ValueError as error:
            raise ConfigurationError(f"{form.kind} cannot be read: {error}") from None
        tokens = self.tokens()
        matcher = LLMatcher(tokens.view, grammar, log_level=0, limits=compile_limits())
        if matcher.is_error() or matcher.get_grammar_warnings():
            raise ConfigurationError(f"{form.kind} cannot be enforced: {_words(matcher)}")
        return Constraint(matcher, ends, tokens, self._threads, form.kind == "schema")

    def tokens(self) -> TokenBytes:
        """The tokenizer as llguidance needs it, made at the first call; a second or two for a large vocabulary.

        Raises:
            ConfigurationError: the bytes of its tokens are not known.
        """
        with self._lock:
            if self._made is None:
                self._made = TokenBytes(self._tokenizer, self._ends)
            return self._made

    def close(self) -> None:
        """Let the thread end."""
        self._threads.shutdown(wait=False)


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


def _words(matcher: LLMatcher) -> str:
    """What llguidance says, in one line."""
    text = matcher.get_error() or "; ".join(matcher.get_grammar_warnings())
    return " ".join(text.replace("<non-verbose/>", "").split())[:500]
