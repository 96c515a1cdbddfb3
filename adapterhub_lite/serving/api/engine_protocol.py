"""What the server needs of an engine, whether it computes in this process, in replicas or in vLLM.

`InferenceEngine`, `ClusterEngine` and `VllmEngine` fulfil it; mypy checks each where the server is started, and
`tests/serving/test_conformance.py` what they do.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.serving.adapters.slots import ResidentAdapter
from adapterhub_lite.serving.engine.request import EngineStatus, GenerationChunk, GenerationRequest

Listener = Callable[[GenerationChunk | BaseException], None]


class Answer(Protocol):
    """A submitted request, such as a `GenerationHandle`."""

    def cancel(self) -> None:
        """Stop it; its row is free at the next step."""
        ...

    def listen(self, listener: Listener, *, whole: bool = False) -> None:
        """Tell `listener`, on any thread, each chunk as it is made (`whole`: the last alone), or the error at the end."""
        ...


class Engine(Protocol):
    """One base and its adapters, ready to answer. Every method may be called from any thread."""

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base, part of every receipt."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        ...

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request; loads its adapter first, in the caller's thread.

        Raises:
            AdapterHubError: it cannot be answered here.
        """
        ...

    def encode(self, request: GenerationRequest) -> list[int]:
        """The tokens that a request is asked with.

        Raises:
            AdapterHubError: it cannot be answered here.
        """
        ...

    def load(self, reference: str, /) -> ResidentAdapter:
        """Bring an adapter into memory."""
        ...

    def unload(self, reference: str, /) -> bool:
        """Take an adapter out of memory once nobody uses it; False when it was not there."""
        ...

    def resident(self) -> Sequence[ResidentAdapter]:
        """The adapters in memory."""
        ...

    def status(self) -> EngineStatus:
        """Whether it can serve, and its counts."""
        ...

    def ended(self) -> bool:
        """Whether it will never compute again."""
        ...

    def when_ended(self, call: Callable[[], None]) -> None:
        """Make this call, on any thread, when it will never compute again."""
        ...

    def choose(self, reference: str) -> str | Path:
        """Return the reference, or the candidate of its split, whichever the next request gets."""
        ...

    def start_split(self, reference: str, candidate: str, *, share: float) -> ResidentAdapter:
        """Send a share of the requests for one reference to another."""
        ...

    def stop_split(self, reference: str) -> bool:
        """Send them all where the reference points; False without a split."""
        ...

    def splits(self) -> dict[str, tuple[str, float]]:
        """The splits in force: reference -> (candidate, share)."""
        ...
