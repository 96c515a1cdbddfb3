"""The receipt under an answer: which adapters and base produced it, and how fast. Knows a result, not the page."""

from typing import TYPE_CHECKING

from adapterhub_app.display.task import short_digest
from adapterhub_lite.adapter_format.record import StrictModel

if TYPE_CHECKING:
    from adapterhub_lite.serving import GenerationResult


class Receipt(StrictModel):
    """What produced an answer and how fast: `digests` are the adapters' (none for the base); times in seconds."""

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

    @classmethod
    def of(cls, result: "GenerationResult", base: str) -> "Receipt":
        """The receipt of a complete result; `base` is the base model's name."""
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
        )

    def line(self, who: str) -> str:
        """The one line under an answer by `who` (left out when empty)."""
        digest = "+".join(short_digest(digest) for digest in self.digests)
        parts = [who, digest, self.base, f"{self.tokens_per_second:.0f} tok/s"]
        parts += [f"first token {duration(self.first_token_seconds)}", f"switch {duration(self.switch_seconds)}"]
        return " · ".join(part for part in parts if part)

    def details(self) -> str:
        """Every field in full, one a line."""
        rows = [
            ("adapter digest", " + ".join(self.digests) or "none: the bare base answered"),
            ("base", f"{self.base}, fingerprint {self.base_fingerprint}"),
            ("tokens", f"{self.new_tokens}, ended by {self.finish_reason}"),
            ("speed", f"{self.tokens_per_second:.1f} tokens/s"),
            ("queued", duration(self.queue_seconds)),
            ("switch", duration(self.switch_seconds)),
            ("first token", duration(self.first_token_seconds)),
            ("total", duration(self.total_seconds)),
        ]
        return "\n".join(f"{label}: {value}" for label, value in rows)


def duration(seconds: float) -> str:
    """`seconds` for people: µs, ms or s with the digits that matter."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f} ms"
    return f"{seconds:.2f} s"
