"""The engine: one thread owns one frozen base, and answers requests for many adapters in one batch.

The life of a request:

1. `submit`, on the caller's thread: the prompt is tokenized; the pool resolves the adapter argument (`adapters/split`,
   `adapters/sources`), loads what is missing into a slot (`adapters/slots`) and holds it there: a `Route`.
2. It waits in the queue of the scheduler (`scheduling`), a `GenerationSequence` (`sequence`). A form that was asked
   for its answer is compiled before (`constraints`).
3. The engine's thread gives it a row. The runner (`model/runner`) routes the row to the adapter's weights.
4. Each step computes some tokens of every row in one forward pass: pieces of prompts, and one token for each row that
   writes. Keys and values stay in the row (`model/cache/kv_cache`); each row gets its own LoRA delta (`model/lora_*`).
5. When its last known token is computed, the row's logits give the next token (`sampling`), whose text (`text`) goes to
   the caller's outbox at once. Prompts and labels are scored from logits too (`scoring`).
6. At an end token, a stop string or its length it leaves the row and releases the adapter; the caller's
   `GenerationHandle` gets the result, with its receipt. Errors, time-outs and cancelling end it the same way.

Before any request, `from_base` proves that all this computes what the base's own `generate` does (`model/proof`).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases import load_tokenizer, resolve_base
from adapterhub_lite.bases.encoding import end_tokens as base_end_tokens
from adapterhub_lite.devices import free_memory, graph_recorder, trim_heap
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.adapters.hub_source import HubSource
from adapterhub_lite.serving.adapters.pool import AdapterPool, Tier
from adapterhub_lite.serving.adapters.slots import ResidentAdapter
from adapterhub_lite.serving.adapters.sources import AdapterSource, FolderSource, RegistrySource
from adapterhub_lite.serving.engine.asking import PromptEncoder
from adapterhub_lite.serving.engine.constraints import ConstraintCompiler
from adapterhub_lite.serving.engine.core import EngineCore
from adapterhub_lite.serving.engine.probe_check import Verify, check_probes
from adapterhub_lite.serving.engine.request import EngineStatus, GenerationRequest, GenerationResult, Message
from adapterhub_lite.serving.engine.sampling import Sampler
from adapterhub_lite.serving.engine.scoring import LabelLogprobs, PromptLogprobs
from adapterhub_lite.serving.engine.sequence import (
    ChunkStream,
    GenerationHandle,
    GenerationSequence,
)
from adapterhub_lite.serving.engine.text import TextStream
from adapterhub_lite.serving.model.loading import load_for_serving
from adapterhub_lite.serving.model.proof import Verdict, proven
from adapterhub_lite.serving.model.runner import ModelRunner

# One row in so many more is kept for tenants that have none, so that whoever fills the rows delays nobody else.
ROWS_PER_SPARE = 8
# Of the memory that is free when the base has been loaded; the rest is for adapters and for computing.
CACHE_SHARE = 0.5
SHORTEST = 64


class InferenceEngine:
    """Many adapters on one base. Thread-safe; close it, or use it as a context manager.

    Adapters stay in memory (`max_slots` of them, the least recently used goes first) and are routed per row of a
    batch of at most `max_rows`; more requests wait, at most `max_queue`, then are refused. `end_tokens` None takes
    those of the base; an empty set writes every answer to its full length. With `guess`, tokens that probably come next are
    computed ahead and checked while few requests run (`reuse/guesses`): answers are the same, sooner. With `graphs`, steps of
    one token a row are recorded where the device has CUDA graphs (`model/decode_graphs`).
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase,
        base_fingerprint: str,
        *,
        source: AdapterSource | None = None,
        verdict: Verdict | None = None,
        max_slots: int = 64,
        max_host: int = 64,
        max_rank: int = 16,
        max_queue: int = 256,
        spare_rows: int = 0,
        cache_memory: int | None = None,
        end_tokens: frozenset[int] | None = None,
        guess: bool = True,
        graphs: bool = True,
    ) -> None:
        self.base_fingerprint = base_fingerprint
        self.tokenizer = tokenizer
        self._runner = runner
        self._verdict = verdict
        self._pool = AdapterPool(
            source or FolderSource(),
            runner.families,
            base_fingerprint,
            device=runner.device,
            max_slots=max_slots,
            max_host=max_host,
            max_rank=max_rank,
            structure=runner.structure,
            free=lambda: free_memory(runner.device),
        )
        configs = (getattr(runner.model, "generation_config", None), runner.model.config)
        base_ends = base_end_tokens(tokenizer, *configs)
        self._ends = base_ends if end_tokens is None else end_tokens
        self._forms = ConstraintCompiler(tokenizer, base_ends)
        self._vocabulary = runner.vocabulary
        self._encoder = PromptEncoder(tokenizer, runner.max_length, self._vocabulary)
        self._cache_memory = cache_memory
        if cache_memory is not None:
            runner.set_cache_budget(cache_memory)
            if not runner.fits([SHORTEST]):
                raise ConfigurationError(
                    f"Keys and values may take {cache_memory:,} bytes, which is not enough for {SHORTEST} tokens of one "
                    "request. Free some memory, or give more with --cache-memory."
                )
        if graphs:
            runner.record_decoding(graph_recorder(runner.device))
        self._core = EngineCore(runner, max_queue=max_queue, spare_rows=spare_rows, guess=guess)

    @classmethod
    def from_base(
        cls,
        base: str | Path,
        *,
        registry: AdapterRegistry | None = None,
        pull: Sequence[str] = (),
        home: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        device: str | None = None,
        max_rows: int = 16,
        native: bool | None = None,
        cache_memory: int | None = None,
        **options: Any,
    ) -> "InferenceEngine":
        """Load a base by name, folder or Hub id and start serving it.

        `pull` allows hub repositories ("org/*") to be pulled into the registry at their first use. `dtype` None keeps
        the one the base was saved in; `quantization` is as `load_for_serving` takes it. `device` None takes a GPU when there is
        one. `native` None applies adapters by compiled code on a CPU with a C compiler, False by PyTorch alone.
        `cache_memory` bounds what keys and values of all rows take, in bytes; None takes a part of what is free when
        the base has been loaded. `options` are those of the constructor: max_slots, max_host, max_rank, max_queue,
        end_tokens, guess, graphs.

        Raises:
            UnknownNameError: no such base.
            ConfigurationError: a setting that cannot be used, or a base whose own `generate` the engine does not
                reproduce; the text says what differs.
        """
        if max_rows < 1:
            raise ConfigurationError(f"max_rows is {max_rows}, wanted at least 1.")
        if pull and registry is None:
            raise ConfigurationError("Pulling from a hub needs a registry to pull into; give registry=.")
        resolved = resolve_base(base, home=home)
        model, precision = load_for_serving(
            resolved.folder,
            dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            device=device,
            quantization=quantization,
        )
        source: AdapterSource = FolderSource(resolved)
        if registry is not None:
            source = HubSource(registry, pull, base=resolved) if pull else RegistrySource(registry, resolved)
        spare = max(1, max_rows // ROWS_PER_SPARE)
        runner, verdict = proven(
            model,
            resolved.fingerprint,
            adapterhub_home(home),
            rows=max_rows + spare,
            native=native,
            precision=precision,
        )
        # What the base was before it was laid out anew, and what the proof computed with, is free and counts as used.
        trim_heap()
        if cache_memory is None:
            cache_memory = int(free_memory(runner.device) * CACHE_SHARE)
        return cls(
            runner, load_tokenizer(resolved.folder), resolved.fingerprint, source=source, verdict=verdict,
            spare_rows=spare, cache_memory=cache_memory, **options,
        )  # fmt: skip

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

    def stream(self, request: GenerationRequest) -> "ChunkStream":
        """Yield the answer as it is made. The adapter is held from this call on, not from the first chunk on.

        Dropping or closing the stream early cancels the request. Raises as `generate` does.
        """
        return ChunkStream(self.submit(request))

    def score(
        self, prompt: str | Sequence[Message], choices: Sequence[str], *, adapter: str | Path | None = None
    ) -> dict[str, float]:
        """The probability of each choice to begin the answer to a prompt or chat, over all choices: they sum to 1.

        The prompt is computed once. Raises as `generate` does.
        """
        if not choices:
            raise ConfigurationError("There are no choices to score. Give at least one.")
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        result = self.generate(GenerationRequest(**asked, adapter=adapter, labels=choices))
        assert result.label_logprobs is not None
        return dict(zip(choices, torch.tensor(result.label_logprobs).softmax(0).tolist(), strict=True))

    def prepare(self) -> None:
        """Make ready what the first answer of a given form would wait for: a second or two for a large vocabulary."""
        with suppress(ConfigurationError):
            self._forms.tokens()

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request and return its handle at once; the adapter is resolved, and loaded if need be, before."""
        started = time.perf_counter()
        found = self._pool.finder.find(request.adapter)
        form = request.form(found.answer_schema())
        prompt_ids = self._encoder.encode(request, found)
        labels = self._labels(request, prompt_ids, found)
        most = request.max_new_tokens if labels is None else labels.longest
        limit = min(most, self._runner.max_length - len(prompt_ids))
        if not self._runner.fits([len(prompt_ids) + limit]):
            raise ConfigurationError(
                f"The prompt has {len(prompt_ids)} tokens and may get {limit} more. Their keys and values never fit into "
                f"the {self._cache_memory:,} bytes that this engine has for them. Shorten the prompt, ask for fewer "
                "tokens, or start the engine with more --cache-memory."
            )
        route = self._pool.hold(found, request.timeout_seconds)
        try:
            vocabulary = max((self._vocabulary, *(part.weights.rows for part in route.parts)))
            self._encoder.check_tokens(request, prompt_ids, vocabulary)
            # An empty set writes every answer to its full length, an adapter's with an end of its own too.
            ends = self._ends if route.end_tokens is None or not self._ends else route.end_tokens
            # Those of an adapter are whatever its record says.
            ends = frozenset() if request.ignore_eos else frozenset(token for token in ends if token < vocabulary)
            ends |= frozenset(request.stop_token_ids)
            scored = request.prompt_logprobs
            sequence = GenerationSequence(
                request=request,
                prompt_ids=prompt_ids,
                route=route,
                sampler=Sampler(request, prompt_ids, ends),
                stream=TextStream(
                    self._encoder.tokenizer_of(found),
                    request.stop,
                    request.min_tokens,
                    ends if request.special_tokens else None,
                ),
                base_fingerprint=self.base_fingerprint,
                submitted=started,
                limit=limit,
                ends=ends,
                constraint=None if form is None or labels else self._forms.compile(form, ends),
                prompt_logprobs=None if scored is None else PromptLogprobs(prompt_ids, scored),
                labels=labels,
            )
            self._core.add(sequence)
        except BaseException:
            route.release()
            raise
        return GenerationHandle(sequence, self._core.wake)

    def encode(self, request: GenerationRequest) -> list[int]:
        """The tokens that a request is asked with; raises as `submit` does."""
        return self._encoder.encode(request, self._pool.finder.find(request.adapter))

    def load(self, reference: str | Path, *, pin: bool = False, verify: Verify = "files") -> ResidentAdapter:
        """Bring an adapter into memory ahead of its first request; `pin` keeps it there.

        `verify="probes"` first asks this engine the probes recorded with the adapter, beside whatever runs.

        Raises:
            UnknownNameError, AdapterRejectedError, BaseMismatchError: it cannot be served here, or answers otherwise.
            QueueFullError: every slot is in use or pinned.
        """
        if verify == "probes":
            check_probes(self._pool, self._core, self._runner, self.tokenizer, reference)
        return self._pool.load(reference, pin=pin)

    def prefetch(self, reference: str | Path) -> "Future[ResidentAdapter]":
        """Do `load` in the background; the future has its result or its error."""
        return self._pool.prefetch(reference)

    def pin(self, reference: str | Path, pinned: bool = True) -> ResidentAdapter:
        """Load an adapter if need be and keep it in its slot, or let it go like the others again."""
        loaded = self._pool.load(reference)
        self._pool.slots.pin(loaded.digest, pinned)
        return replace(loaded, pinned=pinned)

    def unload(self, reference: str | Path, *, timeout: float | None = None) -> bool:
        """Take an adapter out of memory once nobody uses it; False when it was not there.

        Requests that run finish on it, later ones load it afresh. `timeout` bounds the wait, not the unloading.
        """
        return self._pool.unload(reference, timeout=timeout)

    def resident(self) -> list[ResidentAdapter]:
        """Say which adapters are in memory, the least recently used first."""
        return self._pool.slots.resident()

    def tier(self, reference: str | Path) -> Tier:
        """Say how near an adapter is: "resident", "host" (memory) or "disk"; pulls it when it is on a hub only."""
        return self._pool.tier(reference)

    def choose(self, reference: str) -> str | Path:
        """Return `reference` or the candidate of its split, whichever the next request gets; this is that request."""
        return self._pool.finder.splits.choose(reference)

    def start_split(self, reference: str, candidate: str, *, share: float = 0.1) -> ResidentAdapter:
        """Send `share` (0 to 1) of the requests for `reference` to `candidate`, loaded first; running ones stay.

        Raises:
            ConfigurationError: the share is not between 0 and 1.
        """
        loaded = self._pool.load(candidate)
        self._pool.finder.splits.start(reference, candidate, share)
        return loaded

    def stop_split(self, reference: str) -> bool:
        """Send every request for `reference` where it points, from the next one on; False without a split."""
        return self._pool.finder.splits.stop(reference)

    def splits(self) -> dict[str, tuple[str, float]]:
        """The splits in force: reference -> (candidate, share)."""
        return self._pool.finder.splits.current()

    def status(self) -> EngineStatus:
        """Say how the engine does: whether it can serve, whether it can pull, and its counts since the start."""
        slots = self._pool.slots
        source = self._pool.finder.source
        trouble = source.trouble if isinstance(source, HubSource) else None
        graphs = self._runner.graphs
        return EngineStatus(
            can_serve=self._core.alive,
            max_length=self._runner.max_length,
            can_pull=trouble is None if isinstance(source, HubSource) else None,
            hub_trouble=trouble,
            running=self._core.running,
            waiting=self._core.waiting,
            steps=self._core.steps,
            tokens=self._core.tokens,
            resident=len(slots.resident()),
            loads=slots.loads,
            evictions=slots.evictions,
            damaged=self._pool.damaged,
            splits=self.splits(),
            restarts=self._core.restarts,
            cache_budget=self._cache_memory,
            cache_bytes=self._runner.state_bytes,
            waiting_by_tenant=self._core.waiting_by_tenant(),
            forward=str(self._runner.kind),
            difference=None if self._verdict is None else self._verdict.difference,
            tolerance=None if self._verdict is None else self._verdict.tolerance,
            precision=self._runner.precision or "",
            guessed=self._core.guesses[0],
            guessed_right=self._core.guesses[1],
            reasons=() if self._verdict is None else self._verdict.reasons,
            graphs=0 if graphs is None else len(graphs.keys),
            graphs_replayed=0 if graphs is None else graphs.replayed,
            no_graphs="" if graphs is None else graphs.refusal,
        )

    def ended(self) -> bool:
        """Whether it will never compute again: it was closed, or failed."""
        return not self._core.alive

    def when_ended(self, call: Callable[[], None]) -> None:
        """Make this call, on the engine's thread, when it ends; at once when it has."""
        self._core.when_ended(call)

    def base_digest(self) -> str:
        """The sha256 over the base's weights as they are in memory now."""
        return self._runner.base_digest()

    def close(self) -> None:
        """Stop; whatever waits or runs ends with EngineClosedError."""
        self._pool.close()
        self._core.close()
        self._forms.close()

    def __enter__(self) -> "InferenceEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _labels(
        self, request: GenerationRequest, prompt_ids: Sequence[int], found: FoundAdapters
    ) -> LabelLogprobs | None:
        if not request.labels:
            return None
        return LabelLogprobs(len(prompt_ids), self._encoder.encode_labels(request.labels, len(prompt_ids), found))
