"""What the server needs of an engine, whether it is in this process or behind it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from adapterhub_lite.serving.engine.request import EngineStatus, GenerationChunk, GenerationRequest


class Answer(Protocol):
    """A submitted request, such as a `GenerationHandle`."""

    def cancel(self) -> None:
        """Stop it."""
        ...

    def listen(self, listener: Callable[[GenerationChunk | BaseException], None], *, whole: bool = False) -> None:
        """Tell `listener`, on any thread, each chunk as it is made, or the error that ended them; `whole`: the last."""
        ...


class Engine(Protocol):
    """What the server needs of an engine; `InferenceEngine` is one."""

    base_fingerprint: str
    tokenizer: Any

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request."""
        ...

    def load(self, reference: Any) -> Any:
        """Bring an adapter into memory."""
        ...

    def unload(self, reference: Any) -> bool:
        """Take an adapter out of memory."""
        ...

    def resident(self) -> Sequence[Any]:
        """The adapters in memory."""
        ...

    def status(self) -> EngineStatus:
        """Whether it can serve, and its counts."""
        ...

    def choose(self, reference: str) -> str | Path:
        """The reference or its split, whichever the next request gets."""
        ...

    def start_split(self, reference: str, candidate: str, *, share: float) -> Any:
        """Send a share of the requests for one reference to another."""
        ...

    def stop_split(self, reference: str) -> bool:
        """Send them all where they point again."""
        ...

    def splits(self) -> dict[str, tuple[str, float]]:
        """The splits in force: reference -> (candidate, share)."""
        ...
