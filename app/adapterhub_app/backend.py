"""What every tab works with: the engine, the registry, the access rules, and the answers under way."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from adapterhub_app.access import Access
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine


class Cancellable(Protocol):
    """An answer under way."""

    def cancel(self) -> None:
        """Ask for its end; returns at once."""


class PendingAnswer:
    """An answer from before it is asked for: cancelling it then ends it as soon as it is. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer: Cancellable | None = None
        self.is_cancelled = False

    def attach(self, answer: Cancellable) -> None:
        """Say which answer it became."""
        with self._lock:
            self._answer = answer
            if self.is_cancelled:
                answer.cancel()

    def cancel(self) -> None:
        """Ask for its end; returns at once."""
        with self._lock:
            self.is_cancelled = True
            if self._answer is not None:
                self._answer.cancel()


class LiveAnswers:
    """The answers under way in each browser session, so that Stop ends one's own and nobody else's. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_session: dict[str, list[Cancellable]] = {}

    @contextmanager
    def watch(self, session: str, answer: Cancellable) -> Iterator[None]:
        """Count `answer` as under way in `session` for the block, and cancel it should the block end early."""
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
        """Cancel everything under way in `session`; returns how many answers that were."""
        with self._lock:
            answers = list(self._by_session.get(session, ()))
        for answer in answers:
            answer.cancel()
        return len(answers)

    def stop_all(self, session: str) -> None:
        """Cancel what is under way in a session that ended, on every tab: keys are `session` or `session/tab`."""
        with self._lock:
            keys = [key for key in self._by_session if key.split("/")[0] == session]
        for key in keys:
            self.stop(key)


@dataclass(frozen=True)
class Backend:
    """The rooms behind the page.

    `base_name` is what people call the base that the engine serves; `base` is its folder, where it is known, for
    merging. `hub` is the endpoint to push to and pull from; None for the one `huggingface_hub` is set to.
    """

    engine: InferenceEngine
    registry: AdapterRegistry
    base_name: str
    base: ResolvedBase | None = None
    hub: str | None = None
    access: Access = field(default_factory=Access)
    live: LiveAnswers = field(default_factory=LiveAnswers)
