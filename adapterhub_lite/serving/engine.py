"""The engine: one thread owns one frozen base, and answers requests for many adapters in one batch.

Callers resolve and load adapters in their own threads; the engine's thread only ever computes steps.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from adapterhub_lite.bases import load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.errors import (
    BaseMismatchError,
    ConfigurationError,
)
from adapterhub_lite.serving.bank import Part
from adapterhub_lite.serving.blend import parse_blend
from adapterhub_lite.serving.job import GenerationHandle, Job, Route
from adapterhub_lite.serving.loop import EngineLoop
from adapterhub_lite.serving.request import GenerationChunk, GenerationRequest, GenerationResult
from adapterhub_lite.serving.residency import Entry, Residency, ResidentAdapter
from adapterhub_lite.serving.sampling import Sampler
from adapterhub_lite.serving.source import AdapterFiles, AdapterSource, FolderSource, RegistrySource
from adapterhub_lite.serving.text import TextStream
from adapterhub_lite.serving.trunk import Trunk
from adapterhub_lite.serving.weights import read_adapter_weights


class InferenceEngine:
    """Many adapters on one base. Thread-safe; close it, or use it as a context manager.

    Adapters stay in memory (`max_slots` of them, the least recently used goes first) and are routed per row of a
    batch of at most `max_rows`; more requests wait, at most `max_queue`, then are refused.
    """

    def __init__(
        self,
        trunk: Trunk,
        tokenizer: Any,
        base_fingerprint: str,
        *,
        source: AdapterSource | None = None,
        max_slots: int = 64,
        max_rank: int = 16,
        max_queue: int = 256,
    ) -> None:
        self.base_fingerprint = base_fingerprint
        self.tokenizer = tokenizer
        self._trunk = trunk
        self._source = source or FolderSource()
        self._residency = Residency(max_slots)
        self._max_rank = max_rank
        self._tokenizing = threading.Lock()
        self._loop = EngineLoop(trunk, _end_tokens(trunk.model, tokenizer), max_queue=max_queue)

    @classmethod
    def from_base(
        cls,
        base: str | Path,
        *,
        registry: Any = None,
        home: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
        max_rows: int = 16,
        **options: int,
    ) -> "InferenceEngine":
        """Load a base by name, folder or Hub id and start serving it.

        `dtype` None keeps the one it was saved in. `device` None takes a GPU when there is one. `options` are those
        of the constructor: max_slots, max_rank, max_queue.

        Raises:
            UnknownNameError: no such base.
            ConfigurationError: a base or a setting that cannot be served.
        """
        if max_rows < 1:
            raise ConfigurationError(f"max_rows is {max_rows}, wanted at least 1.")
        resolved = resolve_base(base, home=home)
        chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_base_model(resolved.folder, dtype=chosen, device=place)
        source = RegistrySource(registry) if registry is not None else FolderSource()
        trunk = Trunk(model, rows=max_rows)
        return cls(trunk, load_tokenizer(resolved.folder), resolved.fingerprint, source=source, **options)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Answer one request; it shares its steps with whatever else runs.

        Raises:
            UsageError: an unknown adapter, or a prompt that does not fit.
            AdapterRejectedError, BaseMismatchError: the adapter cannot be served on this base.
            ServingError: queue full, timed out, or the engine was closed.
        """
        return self.submit(request).result()

    def generate_many(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Answer several requests in one mixed batch, in their order; the first failure cancels the others."""
        handles: list[GenerationHandle] = []
        try:
            for request in requests:
                handles.append(self.submit(request))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Yield the answer as it is made. The adapter is held from this call on, not from the first chunk on.

        Leaving the iteration early cancels the request. Raises as `generate` does.
        """
        handle = self.submit(request)

        def chunks() -> Iterator[GenerationChunk]:
            try:
                yield from handle
            finally:
                handle.cancel()

        return chunks()

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request and return its handle at once; the adapter is resolved, and loaded if need be, before."""
        started = time.perf_counter()
        prompt_ids = self._encode(request)
        route = self._route(request.adapter)
        job = Job(
            request=request,
            prompt_ids=prompt_ids,
            route=route,
            sampler=Sampler(request, prompt_ids),
            stream=TextStream(self.tokenizer, request.stop),
            base_fingerprint=self.base_fingerprint,
            submitted=started,
            limit=min(request.max_new_tokens, self._trunk.max_length - len(prompt_ids)),
        )
        try:
            self._loop.add(job)
        except BaseException:
            route.release()
            raise
        return GenerationHandle(job, self._loop.wake)

    def load(self, reference: str | Path, *, pin: bool = False) -> ResidentAdapter:
        """Bring an adapter into memory ahead of its first request; `pin` keeps it there.

        Raises:
            UnknownNameError, AdapterRejectedError, BaseMismatchError: it cannot be served here.
            QueueFullError: every slot is in use or pinned.
        """
        entry, _ = self._acquire(self._locate(str(reference)))
        if pin:
            self._residency.pin(entry.digest, True)
        return self._residency.release(entry)

    def unload(self, reference: str | Path, *, timeout: float | None = None) -> bool:
        """Take an adapter out of memory once nobody uses it; False when it was not there."""
        return self._residency.unload(self._locate(str(reference)).digest, timeout=timeout)

    def resident(self) -> list[ResidentAdapter]:
        """Say which adapters are in memory, the least recently used first."""
        return self._residency.resident()

    def base_digest(self) -> str:
        """The sha256 over the base's weights as they are in memory now."""
        return self._trunk.base_digest()

    def close(self) -> None:
        """Stop; whatever waits or runs ends with EngineClosedError."""
        self._loop.close()

    def __enter__(self) -> "InferenceEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _encode(self, request: GenerationRequest) -> list[int]:
        with self._tokenizing:
            if request.messages is not None:
                try:
                    text = self.tokenizer.apply_chat_template(
                        [dict(message) for message in request.messages], tokenize=False, add_generation_prompt=True
                    )
                except Exception as error:  # jinja raises whatever the template asks for
                    raise ConfigurationError(f"The base's chat template refused the messages: {error}") from error
                ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
            else:
                ids = self.tokenizer.encode(request.prompt or "")
        if not ids:
            raise ConfigurationError(
                "The prompt is empty, so there is nothing to go on from. Give at least one character."
            )
        if len(ids) >= self._trunk.max_length:
            raise ConfigurationError(
                f"The prompt has {len(ids)} tokens, this base takes at most {self._trunk.max_length - 1}. Shorten it."
            )
        return ids

    def _route(self, adapter: str | Path | None) -> Route:
        if adapter is None:
            return Route()
        started = time.perf_counter()
        held: list[Entry] = []

        def release() -> None:
            while held:
                self._residency.release(held.pop())

        parts, names, digests, resident = [], [], [], True
        try:
            blend = parse_blend(adapter)
            for piece in blend:
                entry, was_there = self._acquire(self._locate(piece.reference))
                held.append(entry)
                resident &= was_there
                assert entry.weights is not None
                parts.append(Part(entry.weights, piece.weight))
                factor = "" if len(blend) == 1 and piece.weight == 1.0 else f"*{piece.weight:g}"
                names.append(entry.name + factor)
                digests.append(entry.digest + factor)
        except BaseException:
            release()
            raise
        return Route(tuple(parts), "+".join(names), "+".join(digests), time.perf_counter() - started, release)

    def _locate(self, reference: str) -> AdapterFiles:
        files = self._source.locate(reference)
        if files.base_fingerprint not in (None, self.base_fingerprint):
            raise BaseMismatchError(
                f"{files.name} was made for the base {str(files.base_fingerprint)[:12]}, this engine serves "
                f"{self.base_fingerprint[:12]}. Serve it on its own base, or train it for this one."
            )
        return files

    def _acquire(self, files: AdapterFiles) -> tuple[Entry, bool]:
        def load() -> Any:
            with files.hold():
                return read_adapter_weights(
                    files.weights,
                    self._trunk.families,
                    files.scaling_of,
                    max_rank=self._max_rank,
                    subject=files.name,
                    device=self._trunk.device,
                )

        return self._residency.acquire(files.digest, files.name, load)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)
