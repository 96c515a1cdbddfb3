"""What every tab works with: the engine, the registry, the access rules, and the answers in progress."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from adapterhub_app.access import Access
from adapterhub_app.durations import Durations
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine


class Cancellable(Protocol):
    """An answer in progress."""

    def cancel(self) -> None:
        """Request cancellation; returns at once."""


class PendingAnswer:
    """An answer that may not have been submitted yet; if cancelled early, it is cancelled on submission. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer: Cancellable | None = None
        self.is_cancelled = False

    def attach(self, answer: Cancellable) -> None:
        """Connect the submitted answer."""
        with self._lock:
            self._answer = answer
            if self.is_cancelled:
                answer.cancel()

    def cancel(self) -> None:
        """Request cancellation; returns at once."""
        with self._lock:
            self.is_cancelled = True
            if self._answer is not None:
                self._answer.cancel()


class LiveAnswers:
    """The answers in progress in each browser session, so that Stop affects only that session. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_session: dict[str, list[Cancellable]] = {}

    @contextmanager
    def watch(self, session: str, answer: Cancellable) -> Iterator[None]:
        """Register `answer` in `session` for the duration of the block; it is cancelled when the block ends."""
        with self._lock:
            self._by_session.setdefault(session, []).append(answer)
        try:
            yield
        finally:
            answer.cancel()
            with self._lock:
                remaining = self._by_session[session]
                remaining.remove(answer)
                if not remaining:
                    del self._by_session[session]

    def stop(self, session: str) -> int:
        """Cancel everything in progress in `session`; returns the number of answers."""
        with self._lock:
            answers = list(self._by_session.get(session, ()))
        for answer in answers:
            answer.cancel()
        return len(answers)

    def stop_all(self, session: str) -> None:
        """Cancel everything of a closed session, on every tab: keys are `session` or `session/tab`."""
        with self._lock:
            keys = [key for key in self._by_session if key.split("/")[0] == session]
        for key in keys:
            self.stop(key)


@dataclass(frozen=True)
class Backend:
    """What the page is a view of.

    `base_name` is the displayed name of the base that the engine serves; `base` is its files, if known, for merging.
    `hub` is the endpoint for push and pull; None for the one configured in `huggingface_hub`.
    """

    engine: InferenceEngine
    registry: AdapterRegistry
    base_name: str
    base: ResolvedBase | None = None
    hub: str | None = None
    access: Access = field(default_factory=Access)
    live: LiveAnswers = field(default_factory=LiveAnswers)
    durations: Durations = field(default_factory=Durations)
