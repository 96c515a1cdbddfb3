"""Answers of a given form: a JSON schema, a regular expression, choices or a grammar, as masks over tokens.

By llguidance, an Earley parser over a lexer of derivatives. A form is compiled on the caller's thread, before the request
is queued, within limits of size, time and memory. Which tokens may come next is computed on a thread of its own, while
the model computes the logits that these are chosen from.
"""

import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.engine.forms import compile_limits, grammar_of, in_words
from adapterhub_lite.serving.engine.request import Form

# Between two parts of JSON: a line's end and its indentation. Without a bound a model may write spaces for ever.
MOST_SPACES = 24
WHITE_SPACE = b" \t\n\r"


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
        self._first = True
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

    def forced(self) -> list[int]:
        """The tokens that the form has for what comes next where it leaves no choice; empty where it does."""
        self._next.result()  # the matcher is used by one thread at a time
        return list(self._matcher.compute_ff_tokens())

    def take(self, token: int) -> bool:
        """Go on with a token that was allowed; False when the answer is whole and nothing can follow."""
        without_space = self._tokens.without_space if self._first else None
        self._first = False
        if without_space is not None and int(without_space[token]) >= 0:
            token = int(without_space[token])
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
        if self._first and self._tokens.without_space is not None:
            allowed |= allowed[self._tokens.without_space] & (self._tokens.without_space >= 0)
        if self._spaces is not None and self._spaces.count >= MOST_SPACES:
            allowed &= ~self._tokens.spaces
        return allowed, self._matcher.is_accepting()

    def _too_complex(self) -> str:
        return f"The answer cannot follow its form any further, which is too complex: {in_words([self._matcher.get_error()])}"


class TokenBytes:
    """What llguidance knows of a tokenizer: its `view`, which tokens begin with white space, and what it takes for ends.

    SentencePiece's decoding drops the space before a text, so that "▁yes" begins an answer as "yes" does: then
    `without_space` has, for each token, the one with the same bytes but that space, or -1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigurationError("Answers of this base cannot be given a form: its tokenizer has no fast version.")
        try:
            self.view: LLTokenizer = from_tokenizer(tokenizer, eos_token=ends or None)
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"Answers of this base cannot be given a form: which bytes its tokens stand for is not known ({error})."
            ) from error
        texts = [self.view.decode_bytes([token]) for token in range(self.view.vocab_size)]
        self.spaces = torch.tensor([text[:1] in (b" ", b"\t", b"\n", b"\r") for text in texts])
        self.without_space: torch.Tensor | None = None
        spaced = next((token for token, text in enumerate(texts) if text[:1] == b" " and text.strip()), None)
        if spaced is not None and not str(tokenizer.decode([spaced])).startswith(" "):
            by_text = {text: token for token, text in enumerate(texts) if text}
            ids = [by_text.get(text[1:], -1) if text[:1] == b" " else -1 for text in texts]
            self.without_space = torch.tensor(ids, dtype=torch.long)
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
        grammar, tokens = grammar_of(form), self.tokens()
        matcher = LLMatcher(tokens.view, grammar, log_level=0, limits=compile_limits())
        problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if problems:
            raise ConfigurationError(f"{form.kind} cannot be enforced: {in_words(problems)}")
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
