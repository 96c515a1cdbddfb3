"""The engine: one thread owns one frozen base, and answers requests for many adapters in one batch.

The life of a request:

1. `submit`, on the caller's thread: the prompt is tokenized; the pool resolves the adapter argument (`adapters/split`,
   `adapters/sources`), loads what is missing into a slot (`adapters/slots`) and holds it there: a `Route`.
2. It waits in the queue of the scheduler (`scheduling`), a `GenerationSequence` (`sequence`). A form that was asked
   for its answer is compiled before (`constraints`).
3. The engine's thread gives it a row. The runner (`model/runner`) routes the row to the adapter's weights.
4. Each step computes some tokens of every row in one forward pass: pieces of prompts, and one token for each row that
   writes. Keys and values stay in the row (`model/kv_cache`); each row gets its own LoRA delta (`model/lora_*`).
5. When its last known token is computed, the row's logits give the next token (`sampling`), whose text (`text`) goes to
   the caller's outbox at once. Prompts and labels are scored from logits too (`scoring`).
6. At an end token, a stop string or its length it leaves the row and releases the adapter; the caller's
   `GenerationHandle` gets the result, with its receipt. Errors, time-outs and cancelling end it the same way.

Before any request, `from_base` proves that all this computes what the base's own `generate` does (`model/proof`).
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.adapter_format.quantization import Quantization
from adapterhub_lite.bases import load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.bases.bounded_template import render_bounded
from adapterhub_lite.bases.chat_template import render_chat, template_digest, template_of, words_of
from adapterhub_lite.bases.encoding import encode_after, encode_prompt
from adapterhub_lite.bases.encoding import end_tokens as base_end_tokens
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.adapters.hub_source import HubSource
from adapterhub_lite.serving.adapters.pool import AdapterPool, FoundAdapters, Tier
from adapterhub_lite.serving.adapters.slots import ResidentAdapter
from adapterhub_lite.serving.adapters.sources import AdapterSource, FolderSource, RegistrySource
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
from adapterhub_lite.serving.model.kv_cache import free_memory
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
    those of the base; an empty set writes every answer to its full length.
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
        self._tokenizing = threading.Lock()
        self._template_digest = template_digest(tokenizer)
        configs = (getattr(runner.model, "generation_config", None), runner.model.config)
        base_ends = base_end_tokens(tokenizer, *configs)
        self._ends = base_ends if end_tokens is None else end_tokens
        self._forms = ConstraintCompiler(tokenizer, base_ends)
        weight: torch.Tensor = runner.model.get_input_embeddings().weight  # type: ignore[assignment]
        self._vocabulary = weight.shape[0]
        self._cache_memory = cache_memory
        if cache_memory is not None:
            runner.set_cache_budget(cache_memory)
            if runner.most_rows(SHORTEST) < 1:
                raise ConfigurationError(
                    f"Keys and values may take {cache_memory:,} bytes, which is not enough for {SHORTEST} tokens of one "
                    "request. Free some memory, or give more with --cache-memory."
                )
        self._core = EngineCore(runner, max_queue=max_queue, spare_rows=spare_rows)

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
        the one the base was saved in; `quantization` is None, "int8" or "nf4". `device` None takes a GPU when there is
        one. `native` None applies adapters by compiled code on a CPU with a C compiler, False by PyTorch alone.
        `cache_memory` bounds what keys and values of all rows take, in bytes; None takes a part of what is free when
        the base has been loaded. `options` are those of the constructor: max_slots, max_host, max_rank, max_queue,
        end_tokens.

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
        model = load_base_model(
            resolved.folder,
            dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            quantization_config=_quantization(quantization),
        )
        source: AdapterSource = FolderSource(resolved)
        if registry is not None:
            source = HubSource(registry, pull, base=resolved) if pull else RegistrySource(registry, resolved)
        spare = max(1, max_rows // ROWS_PER_SPARE)
        runner, verdict = proven(
            model, resolved.fingerprint, adapterhub_home(home), rows=max_rows + spare, native=native
        )
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
        found = self._pool.find(request.adapter)
        form = request.form(found.answer_schema())
        prompt_ids = self._encode(request, found)
        self._check_tokens(request, prompt_ids)
        labels = self._labels(request, prompt_ids)
        most = request.max_new_tokens if labels is None else labels.longest
        limit = min(most, self._runner.max_length - len(prompt_ids))
        if self._runner.most_rows(len(prompt_ids) + limit) < 1:
            raise ConfigurationError(
                f"The prompt has {len(prompt_ids)} tokens and may get {limit} more. Their keys and values never fit into "
                f"the {self._cache_memory:,} bytes that this engine has for them. Shorten the prompt, ask for fewer "
                "tokens, or start the engine with more --cache-memory."
            )
        route = self._pool.hold(found, request.timeout_seconds)
        try:
            # An empty set writes every answer to its full length, an adapter's with an end of its own too.
            ends = self._ends if route.end_tokens is None or not self._ends else route.end_tokens
            # Those of an adapter are whatever its record says.
            ends = frozenset() if request.ignore_eos else frozenset(token for token in ends if token < self._vocabulary)
            ends |= frozenset(request.stop_token_ids)
            scored = request.prompt_logprobs
            sequence = GenerationSequence(
                request=request,
                prompt_ids=prompt_ids,
                route=route,
                sampler=Sampler(request, prompt_ids, ends),
                stream=TextStream(
                    self.tokenizer, request.stop, request.min_tokens, ends if request.special_tokens else None
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
        return self._encode(request, self._pool.find(request.adapter))

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
        return self._pool.splits.choose(reference)

    def start_split(self, reference: str, candidate: str, *, share: float = 0.1) -> ResidentAdapter:
        """Send `share` (0 to 1) of the requests for `reference` to `candidate`, loaded first; running ones stay.

        Raises:
            ConfigurationError: the share is not between 0 and 1.
        """
        loaded = self._pool.load(candidate)
        self._pool.splits.start(reference, candidate, share)
        return loaded

    def stop_split(self, reference: str) -> bool:
        """Send every request for `reference` where it points, from the next one on; False without a split."""
        return self._pool.splits.stop(reference)

    def splits(self) -> dict[str, tuple[str, float]]:
        """The splits in force: reference -> (candidate, share)."""
        return self._pool.splits.current()

    def status(self) -> EngineStatus:
        """Say how the engine does: whether it can serve, whether it can pull, and its counts since the start."""
        slots = self._pool.slots
        source = self._pool.source
        trouble = source.trouble if isinstance(source, HubSource) else None
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
            cache_bytes=self._runner.cache.nbytes,
            waiting_by_tenant=self._core.waiting_by_tenant(),
            forward=str(self._runner.kind),
            difference=None if self._verdict is None else self._verdict.difference,
            tolerance=None if self._verdict is None else self._verdict.tolerance,
            reasons=() if self._verdict is None else self._verdict.reasons,
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

    def _check_tokens(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> None:
        """Refuse token ids that this base has not."""
        given = {
            "prompt_token_ids": prompt_ids, "stop_token_ids": request.stop_token_ids,
            "logit_bias": request.logit_bias, "allowed_token_ids": request.allowed_token_ids or (),
        }  # fmt: skip
        for name, ids in given.items():
            wrong = next((token for token in ids if not 0 <= token < self._vocabulary), None)
            if wrong is not None:
                raise ConfigurationError(f"{name} has {wrong}; this base has the tokens 0 to {self._vocabulary - 1}.")

    def _labels(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> LabelLogprobs | None:
        if not request.labels:
            return None
        with self._tokenizing:
            encoded = [encode_after(self.tokenizer, label) for label in request.labels]
        tokens, most = sum(map(len, encoded)), self._runner.max_length - len(prompt_ids)
        if tokens > most:
            raise ConfigurationError(
                f"The labels have {tokens} tokens together, and {most} are left after the prompt. Give fewer or shorter ones."
            )
        for (ids, label), (longer, other) in pairwise(sorted(zip(encoded, request.labels, strict=True))):
            if longer[: len(ids)] == ids:
                raise ConfigurationError(
                    f"The label {label!r} is the beginning of {other!r}, so there is no probability of the one against "
                    "the other. Give labels of which none begins another."
                )
        return LabelLogprobs(len(prompt_ids), encoded)

    def _encode(self, request: GenerationRequest, found: FoundAdapters | None = None) -> list[int]:
        if request.prompt_token_ids is not None:
            ids = list(request.prompt_token_ids)
        elif request.messages is None:
            with self._tokenizing:
                ids = encode_prompt(self.tokenizer, request.prompt or "")
        else:
            template = found.template(self._template_digest) if found is not None else None
            whose = "base's" if template is None else "adapter's"
            words = words_of(template or template_of(self.tokenizer, request.tools))
            given = {"tools": request.tools, **request.chat_template_kwargs}
            unread = sorted(key for key, value in given.items() if value and key not in words)
            if unread:
                raise ConfigurationError(f"The {whose} chat template does not read {unread[0]!r}. Ask without it.")
            try:
                # Outside the lock: an adapter's template may take its time, and others need not wait for it.
                render = render_chat if template is None else partial(render_bounded, template)
                go_on = request.continue_final_message
                text = render(
                    self.tokenizer,
                    request.messages,
                    tools=request.tools,
                    arguments={**request.chat_template_kwargs, **({"continue_final_message": True} if go_on else {})},
                    ask=not go_on,
                )
            except ValueError as error:
                raise ConfigurationError(f"The {whose} chat template refused the messages: {error}") from error
            text = text.removesuffix(found.prefill()) if found is not None and not go_on else text
            with self._tokenizing:
                ids = self.tokenizer.encode(text, add_special_tokens=False)
        if request.truncate_prompt_tokens is not None:
            ids = ids[-request.truncate_prompt_tokens :]
        if not ids:
            raise ConfigurationError(
                "The prompt is empty, so there is nothing to go on from. Give at least one character."
            )
        if len(ids) >= self._runner.max_length:
            raise ConfigurationError(
                f"The prompt has {len(ids)} tokens, this base takes at most {self._runner.max_length - 1}. Shorten it."
            )
        return ids


def _quantization(kind: str | None) -> Any:
    try:
        chosen = Quantization.of(kind)
    except ValueError as error:
        raise ConfigurationError(f"quantization is {kind!r}: {error}.") from None
    return chosen.bitsandbytes() if chosen else None
