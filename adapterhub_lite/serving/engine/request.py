"""What goes into the engine and what comes out: value objects only. Knows nothing of models or threads."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapterhub_lite.errors import ConfigurationError

Message = Mapping[str, Any]  # a message holds whatever the template reads
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Form:
    """What an answer has to look like. `text` is JSON for a schema and for choices, else the expression or grammar."""

    kind: Literal["schema", "regex", "choices", "grammar"]
    text: str


def schema_form(schema: Mapping[str, Any]) -> Form:
    """The form of answers that are JSON after a schema.

    Raises:
        ConfigurationError: the schema is not JSON.
    """
    try:
        return Form("schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"The schema is not JSON: {error}") from None


@dataclass(frozen=True)
class GenerationRequest:
    """One question to the base or to an adapter.

    `prompt` is raw text, `prompt_token_ids` the same as tokens, taken as they are; `messages` are chat messages (role,
    content, and what else the template reads) put through the chat template, of the adapter if it brings one, with
    `tools` and `chat_template_kwargs`: exactly one of the three. With `continue_final_message` the answer goes on with
    the last message. `truncate_prompt_tokens` keeps that many tokens of the prompt, the last ones.
    `adapter` is a reference ("sql@prod"), a blend ("sql:3*0.7+event@prod*0.3"), the `Path` of a PEFT folder, or None for
    the base; a string is never taken for a path.

    An answer ends at an end token (not with `ignore_eos`), at one of `stop_token_ids` or at a `stop` string, at none of
    them before `min_tokens`, and after `max_new_tokens` in any case. `temperature` 0 is greedy. `logit_bias` is added to
    the logits of its tokens, `allowed_token_ids` allows no others; presence and frequency penalties are OpenAI's, the rest
    are transformers'. At most one of `schema` (a JSON schema), `regex`, `choices` and `grammar` (Lark or GBNF) gives the
    answer's form: it then has that form, unless `max_new_tokens` or a stop string ends it before. Without one, the schema
    that was kept with the adapter is the form, but with `any_form`.

    With `special_tokens` the text holds those of the answer too, save the one that ends it.

    `logprobs` asks for the log-probability of each chosen token and of that many alternatives, `prompt_logprobs` for the
    same of the prompt's tokens. With `labels` nothing is written: they get their log-probabilities as the answer's
    beginning. `timeout_seconds` counts from submission. Rows are shared fairly between tenants.

    Raises:
        ConfigurationError: a setting is out of range; the text lists every one that is.
    """

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | Path | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    timeout_seconds: float | None = None
    logprobs: int | None = None
    tenant: str = ""
    prompt_token_ids: Sequence[int] | None = None
    continue_final_message: bool = False
    truncate_prompt_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    schema: Mapping[str, Any] | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    any_form: bool = False
    prompt_logprobs: int | None = None
    labels: Sequence[str] = ()
    special_tokens: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        problems = [text for broken, text in (*self._numbers(), *self._contents()) if broken]
        if problems:
            raise ConfigurationError("The request cannot be served: " + "; ".join(problems) + ".")

    def _numbers(self) -> list[tuple[bool, str]]:
        timeout, most = self.timeout_seconds, self.max_new_tokens
        checks = [
            (not most >= 0, f"max_new_tokens is {most}, wanted at least 0"),
            (not 0 <= self.min_tokens <= most, f"min_tokens is {self.min_tokens}, wanted 0 to max_new_tokens, {most}"),
            (not 0.0 <= self.temperature <= 100.0, f"temperature is {self.temperature}, wanted 0 to 100"),
            (not 0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}, wanted more than 0 and at most 1"),
            (not self.top_k >= 0, f"top_k is {self.top_k}, wanted 0 (off) or more"),
            (not 0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}, wanted 0 to 1"),
            (
                not 0.0 < self.repetition_penalty <= 100.0,
                f"repetition_penalty is {self.repetition_penalty}, wanted > 0",
            ),
            (self.seed is not None and not 0 <= self.seed < 2**63, f"seed is {self.seed}, wanted 0 to 2**63 - 1"),
            (timeout is not None and not timeout > 0, f"timeout_seconds is {timeout}, wanted more than 0"),
            (
                self.truncate_prompt_tokens is not None and not self.truncate_prompt_tokens >= 1,
                f"truncate_prompt_tokens is {self.truncate_prompt_tokens}, wanted at least 1",
            ),
        ]
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            checks.append((not -2.0 <= value <= 2.0, f"{name} is {value}, wanted -2 to 2"))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            wrong = value is not None and not 0 <= value <= MAX_TOP_LOGPROBS
            checks.append((wrong, f"{name} is {value}, wanted 0 to {MAX_TOP_LOGPROBS}"))
        return checks

    def _contents(self) -> list[tuple[bool, str]]:
        sources = (self.prompt, self.prompt_token_ids, self.messages)
        forms = [name for name in ("schema", "regex", "choices", "grammar") if getattr(self, name) is not None]
        return [
            (
                sum(source is not None for source in sources) != 1,
                "give exactly one of prompt, prompt_token_ids and messages",
            ),
            (self.messages is not None and len(self.messages) == 0, "messages is empty"),
            (any(not text for text in self.stop), "a stop string is empty"),
            (len(forms) > 1, f"give one form of the answer, not {' and '.join(forms)}"),
            (self.choices is not None and not all(self.choices or [""]), "choices is empty, or one of them is"),
            (not all(self.labels), "one of the labels is empty"),
            (len(set(self.labels)) < len(self.labels), "two labels are the same"),
            (self.allowed_token_ids is not None and not self.allowed_token_ids, "allowed_token_ids is empty"),
            (any(not math.isfinite(bias) for bias in self.logit_bias.values()), "a logit_bias is not finite"),
            (self.continue_final_message and self.messages is None, "continue_final_message needs messages"),
            (bool(self.labels) and self.prompt_logprobs is not None, "give labels or prompt_logprobs, not both"),
        ]

    def form(self, of_adapter: Mapping[str, Any] | None = None) -> Form | None:
        """The form of the answer: what was asked for, or else the schema `of_adapter`.

        Raises:
            ConfigurationError: the schema is not JSON.
        """
        if self.schema is not None:
            return schema_form(self.schema)
        if self.choices is not None:
            return Form("choices", json.dumps(list(self.choices)))
        if self.regex is not None:
            return Form("regex", self.regex)
        if self.grammar is not None:
            return Form("grammar", self.grammar)
        return None if of_adapter is None or self.any_form else schema_form(of_adapter)


@dataclass(frozen=True)
class Usage:
    """Tokens read and written; of those read, `cached_tokens` were taken over from another request's beginning."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds. `switch_seconds` runs from the reference to a routed row: look-up, hold, copy into the row's bank."""

    queue_seconds: float = 0.0
    switch_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a token under the model itself (before temperature, penalties and the answer's form),
    and of the likeliest ones. None is that of a prompt's first token, which nothing precedes.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """An answer with its receipt: which adapter bytes and which base produced it.

    `finish_reason` is "stop" (end token, stop string, or a form that nothing can follow) or "length": an answer of a
    given form may then be incomplete. `token_ids` are the tokens produced, the end token included; `text` ends before a
    stop string. `adapter_digest` is None for the base alone. `label_logprobs` are in the order of the labels.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    adapter: str | None
    adapter_digest: str | None
    base_fingerprint: str
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    label_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of text as it is made, with the tokens since the piece before it and their log-probabilities.

    The first one carries the prompt's log-probabilities where they were asked for. The last one has `done` true and
    carries the whole `result`.
    """

    text: str
    done: bool = False
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_tokens: int = 0
    result: GenerationResult | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EngineStatus:
    """How an engine does. `can_pull` is None without a hub, False while the hub cannot be reached: what is on this
    machine is served all the same. `steps`, `tokens`, `loads`, `evictions` and `damaged`
    (bytes that were not the recorded ones when they were loaded) count since the start; `splits` maps a
    reference to (candidate, share).

    `forward` is how the base is computed: "lean", "packed" and "stacked" are batches, "row by row" and "recomputed" are
    slower and for families that cannot be batched exactly; `reasons` say why no faster way is. `difference` is the largest
    from the model's own logits, relative to their size, that was found at start, and `tolerance` what is rounding; None
    where nothing was compared. `guessed` tokens were computed before they were chosen, `guessed_right` of them then were.
    `precision` is "int8" or "int4" where the base's linear layers are kept so, by the engine's
    own code. `graphs` kinds of step are recorded on a GPU now, and `graphs_replayed` steps were computed by them; `no_graphs`
    says why none are, empty where the device has no such thing.

    `restarts` counts how often the engine began anew after a failure of its own. `cache_bytes` of at most `cache_budget`
    (None: no limit) are allocated for keys and values. `max_length` are the tokens that prompt and answer may have.
    """

    can_serve: bool
    can_pull: bool | None
    hub_trouble: str | None
    running: int
    waiting: int
    steps: int
    tokens: int
    resident: int
    loads: int
    evictions: int
    damaged: int
    splits: dict[str, tuple[str, float]]
    forward: str = ""
    difference: float | None = None
    tolerance: float | None = None
    reasons: tuple[str, ...] = ()
    precision: str = ""
    guessed: int = 0
    guessed_right: int = 0
    graphs: int = 0
    graphs_replayed: int = 0
    no_graphs: str = ""
    restarts: int = 0
    cache_budget: int | None = None
    cache_bytes: int = 0
    max_length: int = 0
    waiting_by_tenant: dict[str, int] = field(default_factory=dict)
