"""What goes into the engine and what comes out: value objects only. Knows nothing of models or threads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import ConfigurationError

Message = Mapping[str, Any]  # a message holds whatever the template reads
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class GenerationRequest:
    """One question to the base or to an adapter.

    `prompt` is raw text; `messages` are chat messages (role, content, and what else the template reads) put through the
    chat template, of the adapter if it brings one, with `tools` and `chat_template_kwargs`: exactly one of the two.
    `adapter` is a reference ("sql@prod"), a blend ("sql:3*0.7+event@prod*0.3"), the `Path` of a
    PEFT folder, or None for the base; a string is never taken for a path. `temperature` 0 is greedy. `logprobs` asks
    for the log-probability of each chosen token and of that many alternatives. `timeout_seconds` counts from
    submission. Rows are shared fairly between tenants.

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

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        timeout = self.timeout_seconds
        checks: list[tuple[bool, str]] = [
            ((self.prompt is None) == (self.messages is None), "give exactly one of prompt and messages"),
            (self.messages is not None and len(self.messages) == 0, "messages is empty"),
            (not self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, wanted at least 1"),
            (not 0.0 <= self.temperature <= 100.0, f"temperature is {self.temperature}, wanted 0 to 100"),
            (not 0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}, wanted more than 0 and at most 1"),
            (not self.top_k >= 0, f"top_k is {self.top_k}, wanted 0 (off) or more"),
            (
                not 0.0 < self.repetition_penalty <= 100.0,
                f"repetition_penalty is {self.repetition_penalty}, wanted > 0",
            ),
            (self.seed is not None and not 0 <= self.seed < 2**63, f"seed is {self.seed}, wanted 0 to 2**63 - 1"),
            (any(not text for text in self.stop), "a stop string is empty"),
            (timeout is not None and not timeout > 0, f"timeout_seconds is {timeout}, wanted more than 0"),
            (
                self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
                f"logprobs is {self.logprobs}, wanted 0 to {MAX_TOP_LOGPROBS}",
            ),
        ]
        problems = [text for broken, text in checks if broken]
        if problems:
            raise ConfigurationError("The request cannot be served: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

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
    """Natural log-probability of a chosen token under the model (before temperature), and of the likeliest others."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """An answer with its receipt: which adapter bytes and which base produced it.

    `finish_reason` is "stop" (end token or stop string) or "length". `token_ids` are the tokens produced, the end
    token included; `text` ends before a stop string. `adapter_digest` is None for the base alone.
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


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of text as it is made. The last one has `done` true and carries the whole `result`."""

    text: str
    done: bool = False
    result: GenerationResult | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EngineStatus:
    """How an engine does. `can_pull` is None without a hub, False while the hub cannot be reached: what is on this
    machine is served all the same. `steps`, `tokens`, `loads`, `evictions` and `damaged`
    (bytes that were not the recorded ones when they were loaded) count since the start; `splits` maps a
    reference to (candidate, share).

    `forward` is how the base is computed: "lean" and "packed" are batches, "row by row" and "recomputed" are slower and
    for families that cannot be batched exactly; `reasons` say why no faster way is. `difference` is the largest from
    the model's own logits, relative to their size, that was found at start; None where nothing was compared.

    `restarts` counts how often the engine began anew after a failure of its own. `cache_bytes` of at most `cache_budget`
    (None: no limit) are allocated for keys and values.
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
    reasons: tuple[str, ...] = ()
    restarts: int = 0
    cache_budget: int | None = None
    cache_bytes: int = 0
    waiting_by_tenant: dict[str, int] = field(default_factory=dict)
