"""A gate in front of an engine's steps, so that what a test does in the middle of an answer is in its middle."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from adapterhub_lite.serving import InferenceEngine


class StepGate:
    """Lets the engine's real steps through one by one, so that a test knows where in an answer it is."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine, self._forward = engine, engine._runner.forward
        self._allowed = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.fault: Callable[[], None] | None = None
        engine._runner.forward = self._step  # type: ignore[method-assign]

    def _step(self, step: Any) -> torch.Tensor:
        self.begun.release()
        assert self._allowed.acquire(timeout=300), "nobody let the step through"
        self.sizes.append(len(step.token_ids))
        if self.fault is not None:
            self.fault()
        return self._forward(step)

    def allow(self, steps: int) -> None:
        """Let this many more steps begin."""
        self._allowed.release(steps)

    def remove(self) -> None:
        """Let every step through again, the one that waits too."""
        self._engine._runner.forward = self._forward  # type: ignore[method-assign]
        self.allow(1)
