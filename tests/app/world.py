"""The types of the app's fixtures: a small world, and what serves and operates its page."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapterhub_app.access import Access
from adapterhub_app.backend import Backend
from adapterhub_app.launch import RunningApp
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine


@dataclass
class World:
    """A registry with `sql` (versions 1 and 2, prod at 1), `event` and `odd` (hostile texts), and an engine over it."""

    home: Path
    registry: AdapterRegistry
    engine: InferenceEngine
    base: ResolvedBase

    def backend(self, access: Access | None = None) -> Backend:
        """What the handlers get."""
        return Backend(self.engine, self.registry, "tiny", base=self.base, access=access or Access())


class Serve(Protocol):
    """Serve the world's app on a free port; `options` are those of `launch`."""

    def __call__(self, **options: Any) -> RunningApp: ...


class Hand(Protocol):
    """Pick in a drop-down list by the keyboard, as a person would: page, selector of the list, text to type."""

    def __call__(self, page: Any, place: str, words: str) -> None: ...


def until(true: Callable[[], bool]) -> None:
    """Wait until something is so, as long as for anything that a page shows."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def in_the_engine(engine: InferenceEngine) -> int:
    """Requests in rows or in the queue."""
    status = engine.status()
    return status.running + status.waiting
