"""Several engines as one: replicas in Ray Serve behind the same server, on this machine or on a cluster of machines.

The server resolves every request to digests before it is sent, so a moved alias holds for all replicas at once; Ray
sends a request to a replica that has its adapter already. Imports ray, which only `serve --cluster` needs. Ray has no
types: what it returns is `Any` here.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError

from adapterhub_lite.bases import load_tokenizer, resolve_base
from adapterhub_lite.errors import RequestCancelledError, ResourceError, ServingError
from adapterhub_lite.serving.adapters.slots import ResidentAdapter
from adapterhub_lite.serving.adapters.split import Splits
from adapterhub_lite.serving.cluster.replica import Refusal, application
from adapterhub_lite.serving.cluster.settings import ClusterSettings
from adapterhub_lite.serving.engine.request import EngineStatus, GenerationChunk, GenerationRequest, GenerationResult

T = TypeVar("T")
APPLICATION = "adapterhub-lite"
# How often a request whose replica died is sent to another one.
RETRIES = 3
CONTROL_SECONDS = 60.0


class RemoteAnswer:
    """A request on a replica: iterate over its chunks, or wait for its result. Like `GenerationHandle`, for one consumer.

    When its replica dies, the request is sent to another one, unless a part of its answer was handed out already.
    """

    def __init__(self, handle: Any, request: GenerationRequest) -> None:
        self._handle, self._request = handle, request
        self._cancelled = threading.Event()
        self._response = self._send()

    def cancel(self) -> None:
        """Stop the request; reading it then raises RequestCancelledError."""
        self._cancelled.set()
        self._response.cancel()

    def listen(self, listener: Callable[[GenerationChunk | BaseException], None], *, whole: bool = False) -> None:
        """Call `listener`, on a thread of its own, with each chunk (`whole`: the last alone), or the error at the end."""

        def forward() -> None:
            try:
                chunks: Iterable[GenerationChunk] = (
                    (GenerationChunk("", done=True, result=self.result()),) if whole else self
                )
                for chunk in chunks:
                    listener(chunk)
            except BaseException as error:
                listener(error)

        threading.Thread(target=forward, name="adapterhub-answer", daemon=True).start()

    def __iter__(self) -> Iterator[GenerationChunk]:
        """Yield chunks as they are made; the last one is `done` and carries the result.

        Raises:
            AdapterHubError: whatever the replica's engine refused with.
            ServingError: the replica died in the middle of the answer, or too many died.
        """
        handed_out = False
        for left in reversed(range(RETRIES + 1)):
            try:
                for chunk in self._response:
                    if isinstance(chunk, Refusal):
                        raise chunk.error()
                    handed_out = True
                    yield chunk
                    if chunk.done:
                        return
            except RayActorError as error:
                if handed_out or not left:
                    raise ServingError("The replica that made this answer died; send the request again.") from error
                self._response = self._send()
            except BaseException as error:
                if self._cancelled.is_set():
                    raise RequestCancelledError("The request was cancelled by its caller.") from error
                raise

    def result(self) -> GenerationResult:
        """Wait for the whole answer; another replica makes it when one dies. Raises as iterating does."""
        for left in reversed(range(RETRIES + 1)):
            try:
                *_, last = self
                assert last.result is not None
                return last.result
            except ServingError as error:
                if not left or not isinstance(error.__cause__, RayActorError):
                    raise
                self._response = self._send()
        raise AssertionError("the last try returns or raises")

    def _send(self) -> Any:
        options: dict[str, Any] = {"stream": True}
        if self._request.adapter is not None:
            options["multiplexed_model_id"] = str(self._request.adapter)
        response = self._handle.options(**options).answer.remote(self._request)
        if self._cancelled.is_set():
            response.cancel()
        return response


class ClusterEngine:
    """The server's `Engine`, computed by replicas. Close it, or use it as a context manager.

    Splits are kept here, in the one server; what a replica needs comes from the registry in `home`, which every
    machine of the cluster must see under the same path. `options` are those of `InferenceEngine.from_base`.

    Raises:
        ResourceError: no Ray cluster at the address.
    """

    def __init__(
        self, base: str | Path, settings: ClusterSettings, *, home: str | Path | None = None, **options: Any
    ) -> None:
        resolved = resolve_base(base, home=home)
        self.base_fingerprint = resolved.fingerprint
        self.tokenizer = load_tokenizer(resolved.folder)
        self._splits = Splits()
        self._ours = not ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(address=settings.ray_address or "local", log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError) as error:
                raise ResourceError(f"There is no Ray cluster at {settings.ray_address!r}: {error}") from error
        # Requests come through our own server: Ray's would open a port without our limits and keys.
        serve.start(proxy_location="Disabled")
        made = application(resolved.folder, home, deployment=settings.deployment(), options=options)
        self._handle = serve.run(made, name=APPLICATION, route_prefix=None)

    def submit(self, request: GenerationRequest) -> RemoteAnswer:
        """Send a request to a replica; what it refuses is raised where the answer is read."""
        return RemoteAnswer(self._handle, request)

    def encode(self, request: GenerationRequest) -> list[int]:
        """The tokens that a request is asked with, by any replica. Raises as `InferenceEngine.encode` does."""
        found: list[int] | Refusal = self._handle.encode.remote(request).result(timeout_s=CONTROL_SECONDS)
        if isinstance(found, Refusal):
            raise found.error()
        return found

    def load(self, reference: str) -> ResidentAdapter:
        """Bring an adapter into the memory of every replica. Raises as `InferenceEngine.load` does."""
        loaded: list[ResidentAdapter] = self._everywhere("load", reference)
        return loaded[0]

    def unload(self, reference: str) -> bool:
        """Take an adapter out of every replica's memory once nobody uses it; False when it was in none."""
        return any(self._everywhere("unload", reference))

    def resident(self) -> list[ResidentAdapter]:
        """The adapters in memory, replica by replica."""
        return [one for _, _, held in self.look() for one in held]

    def look(self) -> list[tuple[int, EngineStatus, list[ResidentAdapter]]]:
        """(process, status, adapters in memory) of each replica."""
        return self._everywhere("look")

    def status(self) -> EngineStatus:
        """The replicas as one engine: it can serve while one of them can, and its counts are their sums."""
        try:
            found = [status for _, status, _ in self.look()]
        except (ServingError, RayActorError, TimeoutError):
            found = []

        def total(name: str) -> int:
            return sum(getattr(one, name) for one in found)

        return EngineStatus(
            can_serve=any(one.can_serve for one in found),
            can_pull=None,
            hub_trouble=None,
            running=total("running"),
            waiting=total("waiting"),
            steps=total("steps"),
            tokens=total("tokens"),
            resident=total("resident"),
            loads=total("loads"),
            evictions=total("evictions"),
            damaged=total("damaged"),
            splits=self.splits(),
            forward=found[0].forward if found else "",
            difference=found[0].difference if found else None,
            reasons=found[0].reasons if found else (),
            graphs=total("graphs"),
            graphs_replayed=total("graphs_replayed"),
            no_graphs=found[0].no_graphs if found else "",
            restarts=total("restarts"),
            cache_budget=total("cache_budget") if all(one.cache_budget for one in found) else None,
            cache_bytes=total("cache_bytes"),
            max_length=min((one.max_length for one in found), default=0),
        )

    def ended(self) -> bool:
        """Never: Ray replaces a replica whose engine has ended."""
        return False

    def when_ended(self, call: Callable[[], None]) -> None:
        """Never, likewise."""

    def choose(self, reference: str) -> str | Path:
        """Return `reference` or the candidate of its split, whichever the next request gets."""
        return self._splits.choose(reference)

    def start_split(self, reference: str, candidate: str, *, share: float = 0.1) -> ResidentAdapter:
        """Send a share of the requests for one reference to another, loaded everywhere first."""
        loaded = self.load(candidate)
        self._splits.start(reference, candidate, share)
        return loaded

    def stop_split(self, reference: str) -> bool:
        """Send every request for `reference` where it points; False without a split."""
        return self._splits.stop(reference)

    def splits(self) -> dict[str, tuple[str, float]]:
        """The splits in force: reference -> (candidate, share)."""
        return self._splits.current()

    def close(self) -> None:
        """End the replicas, and Ray where it was started here."""
        serve.delete(APPLICATION)
        if self._ours:
            serve.shutdown()
            ray.shutdown()

    def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        results = self._handle.broadcast(method, *arguments).results(timeout_s=CONTROL_SECONDS)
        for result in results:
            if isinstance(result, Refusal):
                raise result.error()
        if not results:
            raise ServingError("No replica is running now; try again later.")
        return list(results)

    def __enter__(self) -> "ClusterEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
