"""One answer as it grows, and the receipt under it. Chat, Compare and Blend all get their answers here."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from adapterhub_app.backend import Backend, PendingAnswer
from adapterhub_app.display.escape import sentence
from adapterhub_app.display.task import Task, short_digest
from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import RequestCancelledError
from adapterhub_lite.serving import GenerationRequest, GenerationResult
from adapterhub_lite.serving.engine.forms import is_of_form
from adapterhub_lite.serving.engine.request import schema_form

# People see no more updates than this, and the pages of eight people together must leave the processor to the model.
SECONDS_BETWEEN_UPDATES = 0.05
STOPPED = "stopped"
# Of an answer longer than this the first tokens are shown with their probabilities.
MOST_TOKENS = 512
FORMS = {
    "": "",
    "whole": "checked: valid after its schema",
    "cut": "checked: cut off, so not valid after its schema",
    "broken": "checked: not valid after its schema",
}


class Receipt(StrictModel):
    """What produced an answer, and how fast. `digests` are those of the adapters (none for the base); times in seconds."""

    digests: tuple[str, ...] = ()
    base: str
    base_fingerprint: str
    new_tokens: int
    finish_reason: str
    tokens_per_second: float
    first_token_seconds: float
    switch_seconds: float
    queue_seconds: float
    total_seconds: float
    form: Literal["", "whole", "cut", "broken"] = ""

    @classmethod
    def of(cls, result: GenerationResult, base: str, schema: Mapping[str, Any] | None = None) -> "Receipt":
        """The receipt of a complete result; `base` is the base model's name, `schema` what the task says of its answers.

        The engine holds answers to that schema; whether this one, as it is shown, is valid is checked again here.
        """
        timings = result.timings
        return cls(
            digests=tuple(result.adapter_digest.split("+")) if result.adapter_digest else (),
            base=base,
            base_fingerprint=result.base_fingerprint,
            new_tokens=len(result.token_ids),
            finish_reason=result.finish_reason,
            tokens_per_second=timings.tokens_per_second,
            first_token_seconds=timings.first_token_seconds,
            switch_seconds=timings.switch_seconds,
            queue_seconds=timings.queue_seconds,
            total_seconds=timings.total_seconds,
            form="" if schema is None else form_of(result, schema),
        )

    def line(self, who: str) -> str:
        """Summarise in one line for display under an answer; an empty `who` is left out."""
        digest = "+".join(short_digest(digest) for digest in self.digests)
        parts = [who, digest, self.base, f"{self.tokens_per_second:.0f} tok/s"]
        parts += [f"first token {duration(self.first_token_seconds)}", f"switch {duration(self.switch_seconds)}"]
        parts.append(FORMS[self.form])
        return " · ".join(part for part in parts if part)

    def details(self) -> str:
        """Every field in full, one per line."""
        rows = [
            ("adapter digest", " + ".join(self.digests) or "none: the bare base answered"),
            ("", "the sha256 over the adapter's files: the same digest is the same adapter, byte for byte"),
            ("base", f"{self.base}, fingerprint {self.base_fingerprint}"),
            ("", "the sha256 over the base's weights, configuration, tokenizer and chat template"),
            ("tokens", f"{self.new_tokens}, ended by {self.finish_reason}"),
            ("speed", f"{self.tokens_per_second:.1f} tokens/s"),
            ("queued", duration(self.queue_seconds)),
            ("switch", f"{duration(self.switch_seconds)} to have the adapter ready, which is all that changed"),
            ("first token", duration(self.first_token_seconds)),
            ("total", duration(self.total_seconds)),
        ]
        return "\n".join(f"{label}: {value}" if label else f"    ({value})" for label, value in rows)


def form_of(result: GenerationResult, schema: Mapping[str, Any]) -> Literal["whole", "cut", "broken"]:
    """Whether the text of a result is valid after a schema; if not, whether that is because it was cut off."""
    if is_of_form(schema_form(schema), result.text):
        return "whole"
    return "broken" if result.finish_reason == "stop" else "cut"


def duration(seconds: float) -> str:
    """Format `seconds` as µs, ms or s with two or three significant digits."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f} ms"
    return f"{seconds:.2f} s"


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are sampled: `temperature` 0 is greedy; `probabilities` asks for those of the tokens too."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    probabilities: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer so far. It is complete once it has a receipt, or a notice that says why it is missing or cut short."""

    text: str = ""
    receipt: Receipt | None = None
    notice: str | None = None
    tokens: tuple[tuple[str, float], ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the answer is final."""
        return self.receipt is not None or self.notice is not None


def grow_answer(
    backend: Backend,
    session: str,
    task: Task,
    messages: Sequence[dict[str, str]],
    settings: AnswerSettings,
    pending: PendingAnswer | None = None,
) -> Iterator[Answer]:
    """Yield the answer as it grows, at most every `SECONDS_BETWEEN_UPDATES`; the last one is complete.

    Every error becomes the notice of the answer. Closing the iterator cancels the request, and so does cancelling
    `pending`, which is possible before the first step.
    """
    answer, pending = Answer(), pending or PendingAnswer()
    try:
        pinned = Task.parse(task.pinned(backend.registry))
        request = GenerationRequest(
            messages=messages,
            adapter=None if pinned.is_base else str(pinned),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            logprobs=0 if settings.probabilities else None,
        )
        schema = backend.registry.resolve(pinned.parts[0][0]).answer_schema if len(pinned.parts) == 1 else None
        # Registered before it is submitted: loading the adapter may take time, and Stop has to work meanwhile.
        with backend.live.watch(session, pending):
            handle = backend.engine.submit(request)
            pending.attach(handle)
            shown_at = 0.0
            for chunk in handle:
                answer = replace(answer, text=answer.text + chunk.text)
                if chunk.result is not None:
                    receipt = Receipt.of(chunk.result, backend.base_name, schema)
                    yield Answer(chunk.result.text, receipt, tokens=tokens_of(backend, chunk.result))
                elif chunk.text and time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                    shown_at = time.monotonic()
                    yield answer
    except RequestCancelledError:
        yield replace(answer, notice=STOPPED)
    except Exception as error:  # the boundary to the page: every error becomes a sentence
        yield replace(answer, notice=sentence(error))


def tokens_of(backend: Backend, result: GenerationResult) -> tuple[tuple[str, float], ...]:
    """(text, probability) of the first tokens of an answer; empty where the request did not ask for them."""
    return tuple(
        (str(backend.engine.tokenizer.decode([one.token_id])), math.exp(one.logprob))
        for one in (result.logprobs or ())[:MOST_TOKENS]
        if one.logprob is not None
    )
