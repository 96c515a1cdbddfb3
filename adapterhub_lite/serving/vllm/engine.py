"""The server's engine, computed by vLLM: one running server, or several that serve the same base.

The life of a request: `submit`, on the caller's thread, resolves the adapter to verified files, lays out the prompt
(both as the embedded engine does), chooses a backend and holds the adapter there in a slot, loading it under its digest
first (`adapter_files`, `backend`). Once somebody reads, the answer is asked for on the loop's thread (`answer`), as token
ids (`wire`).
"""

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from adapterhub_lite.bases import load_tokenizer
from adapterhub_lite.bases.broken import read_object
from adapterhub_lite.bases.encoding import end_tokens
from adapterhub_lite.bases.fingerprint import ResolvedBase
from adapterhub_lite.errors import ConfigurationError, EngineUnreachableError
from adapterhub_lite.serving.adapters.finding import AdapterFinder, FoundAdapters
from adapterhub_lite.serving.adapters.slots import ResidentAdapter
from adapterhub_lite.serving.adapters.sources import AdapterSource
from adapterhub_lite.serving.adapters.split import WeightedReference
from adapterhub_lite.serving.engine.asking import PromptEncoder
from adapterhub_lite.serving.engine.forms import check_form
from adapterhub_lite.serving.engine.request import EngineStatus, GenerationRequest, GenerationResult
from adapterhub_lite.serving.vllm.adapter_files import Shelf
from adapterhub_lite.serving.vllm.answer import Place, VllmAnswer
from adapterhub_lite.serving.vllm.backend import Backend, Loop
from adapterhub_lite.serving.vllm.base_check import check_base
from adapterhub_lite.serving.vllm.wire import Asked

SLOT_WAIT_SECONDS = 60.0
# A backend that has the adapter is passed over only for one with so many fewer requests in work.
MUCH_LESS = 8


class VllmEngine:
    """Adapters of a registry on vLLM servers at `urls`. Thread-safe; close it, or use it as a context manager.

    `base` is what they serve, as it lies here: its tokenizer lays out prompts, its fingerprint stands in receipts.
    `key` is sent as a bearer token. `max_rank` refuses larger adapters before they are loaded; None leaves that to vLLM.
    `slots` adapters at most are loaded in each. `folder` is where adapters are written, under a path that every vLLM
    sees too; None is for those on this machine. With a `home`, each is first held against the base's own answers, which are
    kept there. `scores_alone`: see `Backend`.

    Raises:
        EngineUnreachableError: one of them does not answer.
        ConfigurationError: what answers is no vLLM, or they serve different things.
        BaseMismatchError: it serves another base.
    """

    def __init__(
        self,
        base: ResolvedBase,
        urls: Sequence[str],
        source: AdapterSource,
        *,
        key: str | None = None,
        max_rank: int | None = None,
        slots: int = 64,
        folder: Path | None = None,
        home: Path | None = None,
        scores_alone: bool = False,
    ) -> None:
        # Set by whoever keeps a vLLM running.
        self.restarts: Callable[[], int] = lambda: 0
        self._differences: list[float | None] = []
        self.base_fingerprint = base.fingerprint
        self.tokenizer = load_tokenizer(base.folder)
        self.finder = AdapterFinder(source, base.fingerprint)
        self._ends = end_tokens(self.tokenizer, base.folder)
        self._loop, self._shelf = Loop(), Shelf(folder)
        self._lock = threading.Lock()
        self._tokens = 0
        # No more requests; and everything let go of.
        self._closed = self._gone = False
        self._at_end: list[Callable[[], None]] = []
        self.backends: list[Backend] = [
            Backend(url, self._loop, self._shelf, key=key, slots=slots, max_rank=max_rank, scores_alone=scores_alone)
            for url in urls
        ]
        try:
            for backend in self.backends:
                backend.connect()
                if home is not None:
                    self._differences.append(check_base(backend, self._loop, base, self.tokenizer, home))
            if len({backend.max_length for backend in self.backends}) > 1:
                lengths = ", ".join(f"{one.url}: {one.max_length}" for one in self.backends)
                raise ConfigurationError(
                    f"The vLLM servers take texts of different lengths ({lengths}). Start them alike."
                )
        except BaseException:
            self.close()
            raise
        self._max_length = self.backends[0].max_length
        vocabulary = read_object(base.folder / "config.json").get("vocab_size") or len(self.tokenizer)
        self._encoder = PromptEncoder(self.tokenizer, self._max_length, vocabulary)
        for backend in self.backends:
            self._loop.start(backend.watch())

    def submit(self, request: GenerationRequest) -> VllmAnswer:
        """Make a request ready to be asked, its adapter loaded; blocks while that is done.

        Raises:
            UsageError: an unknown adapter, a prompt that does not fit, or a setting that vLLM does not take.
            AdapterRejectedError, BaseMismatchError: the adapter cannot be served by vLLM, or on this base.
            ServingError: no slot came free, or no vLLM answers.
        """
        submitted = time.perf_counter()
        found = self.finder.find(request.adapter)
        form = request.form(found.answer_schema())
        ids = self._encoder.encode(request, found)
        self._encoder.check_tokens(request, ids)
        labels = self._encoder.encode_labels(request.labels, len(ids), found) if request.labels else []
        if form is not None and not labels:
            check_form(form)
            if request.logprobs is not None:
                raise ConfigurationError(
                    "vLLM tells the log-probabilities of an answer of a given form among the tokens that the form allows, not "
                    "the model's own. Ask without logprobs, or without the form."
                )
        own = found.end_tokens()
        ends = set(self._ends if own is None else own)
        if form is not None:
            ends |= self._ends  # with which vLLM ends an answer of a form
        ends = (set() if request.ignore_eos else ends) | set(request.stop_token_ids)
        limit = min(request.max_new_tokens, self._max_length - len(ids))
        asked = Asked(request, ids, limit, ends, None if labels else form)
        place = self.place(found, request.timeout_seconds)
        return VllmAnswer(asked, place, self.base_fingerprint, labels, self, self._loop, submitted)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Answer one request. Raises as `submit` does, and what vLLM fails with."""
        return self.submit(request).result()

    def encode(self, request: GenerationRequest) -> list[int]:
        """The tokens that a request is asked with. Raises as `submit` does."""
        return self._encoder.encode(request, self.finder.find(request.adapter))

    def place(self, found: FoundAdapters, timeout: float | None, avoid: tuple[Backend, ...] = ()) -> Place:
        """Choose a backend, none of `avoid`, and hold what was found there; blocks while it is loaded.

        Raises:
            EngineUnreachableError: there is none that answers.
        """
        started, trouble = time.perf_counter(), None
        if self._closed:
            raise EngineUnreachableError("The engine behind this server was closed.")
        for backend in self._in_order(found, avoid):
            try:
                wait = min(timeout or SLOT_WAIT_SECONDS, SLOT_WAIT_SECONDS)
                with self.finder.counting_damage():
                    slot = backend.acquire(found, wait) if found.files else None
                return Place(backend, found, slot, avoid, found.seconds + time.perf_counter() - started)
            except EngineUnreachableError as error:
                trouble, avoid = error, (*avoid, backend)
        raise trouble or EngineUnreachableError(
            "The engine behind this server does not answer now; send the request again in a moment."
        )

    def _in_order(self, found: FoundAdapters, avoid: Sequence[Backend]) -> list[Backend]:
        """The backends to try: those that answer first, of them one that has the adapter unless it is much busier."""
        digest = found.receipt()[1] if found.files else ""

        def rank(backend: Backend) -> tuple[bool, int, int]:
            holds = not digest or digest in backend.slots
            # Which of two equals: always the same one for the same adapter.
            tie = zlib.crc32(f"{digest} {backend.url}".encode())
            return not backend.healthy, backend.in_work + (0 if holds else MUCH_LESS), tie

        return sorted((one for one in self.backends if one not in avoid), key=rank)

    def load(self, reference: str | Path) -> ResidentAdapter:
        """Bring an adapter into every vLLM that answers. Raises as `submit` does."""
        found = self._alone(reference)
        loaded = None
        for backend in self._in_order(found, ()):
            if loaded is None or backend.healthy:
                loaded = backend.slots.release(backend.acquire(found, SLOT_WAIT_SECONDS))
        assert loaded is not None
        return loaded

    def unload(self, reference: str | Path) -> bool:
        """Take an adapter out of every vLLM once nobody uses it; False when it was in none."""
        digest = self.finder.locate(reference).digest
        return sum(backend.unload(digest) for backend in self.backends) > 0

    def _alone(self, reference: str | Path) -> FoundAdapters:
        return FoundAdapters((self.finder.locate(reference),), (WeightedReference(reference),))

    def resident(self) -> list[ResidentAdapter]:
        """The adapters in the slots, vLLM by vLLM."""
        return [one for backend in self.backends for one in backend.slots.resident()]

    def status(self) -> EngineStatus:
        """The backends as one engine: it can serve while one of them can, and its counts are their sums."""
        backends = self.backends
        return EngineStatus(
            can_serve=not self._closed and any(backend.healthy for backend in backends),
            can_pull=None,
            hub_trouble=None,
            running=sum(backend.in_work for backend in backends),
            waiting=0,
            steps=0,
            tokens=self._tokens,
            resident=sum(len(backend.slots.resident()) for backend in backends),
            loads=sum(backend.slots.loads for backend in backends),
            evictions=sum(backend.slots.evictions for backend in backends),
            damaged=self.finder.damaged,
            splits=self.splits(),
            forward="vllm",
            difference=max((one for one in self._differences if one is not None), default=None),
            max_length=self._max_length,
            restarts=self.restarts(),
        )

    def computed(self, tokens: int) -> None:
        """Count tokens of a finished answer."""
        with self._lock:
            self._tokens += tokens

    def ended(self) -> bool:
        """Whether it was closed, or whoever keeps vLLM running has given up."""
        return self._closed

    def when_ended(self, call: Callable[[], None]) -> None:
        """Make this call when it ends; at once when it has."""
        with self._lock:
            if not self._closed:
                self._at_end.append(call)
                return
        call()

    def end(self) -> None:
        """Take no more requests: vLLM will not come back. The server then ends too."""
        with self._lock:
            calls, self._at_end, self._closed = self._at_end, [], True
        for call in calls:
            call()

    def choose(self, reference: str) -> str | Path:
        """Return `reference` or the candidate of its split, whichever the next request gets."""
        return self.finder.splits.choose(reference)

    def start_split(self, reference: str, candidate: str, *, share: float = 0.1) -> ResidentAdapter:
        """Send a share of the requests for one reference to another, loaded first."""
        loaded = self.load(candidate)
        self.finder.splits.start(reference, candidate, share)
        return loaded

    def stop_split(self, reference: str) -> bool:
        """Send every request for `reference` where it points; False without a split."""
        return self.finder.splits.stop(reference)

    def splits(self) -> dict[str, tuple[str, float]]:
        """The splits in force: reference -> (candidate, share)."""
        return self.finder.splits.current()

    def close(self) -> None:
        """End what runs, unload nothing: vLLM may go on without us."""
        with self._lock:
            if self._gone:
                return
            self._gone = True
        self.end()
        for backend in self.backends:
            self._loop.call(backend.close())
        self._loop.close()
        self._shelf.close()

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
