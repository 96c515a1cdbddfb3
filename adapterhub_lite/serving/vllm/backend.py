"""One vLLM server: what it serves, which adapters it has, whether it answers. Its errors become ours here.

All connections live on one event loop in a thread of its own (`Loop`), shared by every backend; the blocking calls are
for other threads.
"""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from adapterhub_lite.errors import (
    AdapterRejectedError,
    ConfigurationError,
    EngineUnreachableError,
    RequestTimeoutError,
    ServingError,
)
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.adapters.slots import AdapterSlots, Slot, SlotRequest
from adapterhub_lite.serving.vllm.adapter_files import RemoteAdapter, Shelf, model_name, write_adapter
from adapterhub_lite.serving.vllm.gate import Gate
from adapterhub_lite.serving.vllm.wire import Json

T = TypeVar("T")
logger = logging.getLogger("adapterhub.vllm")
CONTROL_SECONDS = 120.0
HEALTH_SECONDS = 2.0
# The longest a connection may say nothing while an answer is computed; a request's own limit is shorter.
SILENT_SECONDS = 3600.0


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # For those who look for another place at once when a vLLM dies.
        self.loop.set_default_executor(ThreadPoolExecutor(64, thread_name_prefix="adapterhub-vllm-place"))
        self._thread = threading.Thread(target=self.loop.run_forever, name="adapterhub-vllm", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], timeout: float | None = CONTROL_SECONDS) -> T:
        """Run `work` on the loop and wait for it; for other threads.

        Raises:
            EngineUnreachableError: it took longer than `timeout` seconds.
        """
        waiting = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return waiting.result(timeout)
        except TimeoutError as error:
            waiting.cancel()
            raise EngineUnreachableError(
                f"vLLM did not answer within {timeout:g} s. Try again, or look at its load."
            ) from error

    def soon(self, call: Callable[[], None]) -> None:
        """Make a call on the loop's thread; nothing once the loop has ended."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the loop until it is closed."""
        asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Cancel what runs, and end the thread."""

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.call(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class AdapterGoneError(ServingError):
    """vLLM does not know a model that it was loaded with: it began anew, or somebody unloaded it."""


class Backend:
    """A vLLM server at `url`. `in_work` counts requests; `healthy` is what the last look or request found.

    `max_rank` None leaves ranks to vLLM, which refuses those above its own. `scores_alone`: nothing else is computed there
    while it tells the log-probabilities of a prompt. On a CPU, vLLM 0.32 ends when it has to do both at once.
    """

    def __init__(
        self,
        url: str,
        loop: Loop,
        shelf: Shelf,
        *,
        key: str | None = None,
        slots: int = 64,
        max_rank: int | None = None,
        scores_alone: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        self.base_model = ""
        self.max_length = 0
        self.healthy = False
        self.in_work = 0
        self.damaged = 0
        self._loop, self._shelf, self._max_rank = loop, shelf, max_rank
        self._scores_alone, self._gate = scores_alone, Gate()
        # Models that this vLLM was seen to take, and how often it had failed by then; changed under the lock alone.
        self._loaded: dict[str, int] = {}
        self._failures = 0
        self._control = threading.Lock()
        self.slots = AdapterSlots[RemoteAdapter](slots, gone=self._evicted)
        self.authorization = f"Bearer {key}" if key else ""
        headers = {"Authorization": self.authorization} if key else {}
        self._client = httpx2.AsyncClient(
            base_url=self.url, headers=headers, trust_env=False,
            timeout=httpx2.Timeout(CONTROL_SECONDS, connect=5.0, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
        )  # fmt: skip

    def connect(self) -> None:
        """Learn what is served.

        Raises:
            EngineUnreachableError: nobody answers.
            ConfigurationError: it serves no base, or refuses the key.
        """
        try:
            self._loop.call(self._describe())
        except EngineUnreachableError as error:
            raise EngineUnreachableError(f"No vLLM answers at {self.url}. Start it, or correct the address.") from error

    async def watch(self) -> None:
        """Look after it for ever; after a failure it gets requests again once it answers as the same base."""
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            try:
                found = await self._client.get("/health", timeout=HEALTH_SECONDS * 2)
                if found.status_code == 200 and not self.healthy:
                    await self._describe()
                    logger.info("vLLM at %s answers again.", self.url)
                elif found.status_code != 200:
                    self.failed(f"/health says {found.status_code}")
            except (httpx2.TransportError, EngineUnreachableError) as error:
                self.failed(str(error))
            except ConfigurationError as error:
                logger.error("vLLM at %s gets no requests: %s", self.url, error)

    def failed(self, reason: str) -> None:
        """Note that it does not answer; it has lost its adapters, as far as anybody knows."""
        if self.healthy:
            logger.warning("vLLM at %s does not answer: %s", self.url, reason)
        self.healthy = False
        self._failures += 1

    def acquire(self, found: FoundAdapters, timeout: float) -> Slot[RemoteAdapter]:
        """Hold what was found in a slot, loaded; blocks. Release it with `slots.release`.

        Raises:
            QueueFullError: every slot is in use.
            AdapterRejectedError: vLLM cannot serve it.
            EngineUnreachableError: nobody answers.
        """
        name, digest = found.receipt()

        def load() -> RemoteAdapter:
            return self.ensure(found)

        (slot,), _ = self.slots.acquire([SlotRequest(digest, name, load)], timeout=timeout)
        return slot

    def ensure(self, found: FoundAdapters, *, again: bool = False) -> RemoteAdapter:
        """Have vLLM load what was found, unless it has (`again`: ask it in any case). Raises as `acquire` does."""
        label, digest = found.receipt()
        name = model_name(digest)
        with self._control:
            # Under the lock too: else a folder that is there now may be on its way out with `_evicted`.
            folder, made = self._shelf.put(
                name, self.url, lambda folder: write_adapter(found, folder, max_rank=self._max_rank)
            )
            failures = self._failures
            if again or self._loaded.get(name) != failures:
                self._loaded.pop(name, None)
                try:
                    self._loop.call(self._load(name, folder, label))
                except BaseException:
                    self._shelf.drop(name, self.url)
                    raise
                self._loaded[name] = failures
        return made

    def unload(self, digest: str) -> bool:
        """Have vLLM forget an adapter once nobody uses it; False when it was not there."""
        found = self.slots.unload(digest, timeout=CONTROL_SECONDS)
        if found:
            self._evicted(digest)
        return found

    def _evicted(self, digest: str) -> None:
        name = model_name(digest)
        with self._control:
            # Whoever wants it again meanwhile finds it loaded still.
            if digest in self.slots or name not in self._loaded:
                return
            del self._loaded[name]
            try:
                self._loop.call(self._post("/v1/unload_lora_adapter", {"lora_name": name}))
            except ServingError as error:
                logger.warning("vLLM at %s did not unload %s: %s", self.url, name, error)
            self._shelf.drop(name, self.url)

    async def _describe(self) -> None:
        status, found = await self._get("/v1/models")
        bases = [one for one in found.get("data", ()) if isinstance(one, dict) and not one.get("parent")]
        if status == 401:
            raise ConfigurationError(
                f"vLLM at {self.url} refuses the key. Put the right one into the file of --engine-key."
            )
        if status != 200 or not bases:
            raise ConfigurationError(
                f"What answers at {self.url} is no vLLM that serves a base (/v1/models: {status})."
            )
        name, length = str(bases[0]["id"]), bases[0].get("max_model_len")
        if self.base_model and (name, length) != (self.base_model, self.max_length):
            raise ConfigurationError(f"it serves {name} ({length} tokens) now, and {self.base_model} before")
        self.base_model, self.max_length = name, int(length or 0)
        self.healthy = True

    async def _load(self, name: str, folder: Path, label: str) -> None:
        body = {"lora_name": name, "lora_path": str(folder)}
        status, told = await self._post_raw("/v1/load_lora_adapter", body)
        if status == 400 and "already" in told:
            # It has one of this name since before we began: perhaps from a folder that is not there any more.
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})
            status, told = await self._post_raw("/v1/load_lora_adapter", body)
        if status == 404 and "lora" not in told.lower():
            raise ConfigurationError(
                f"vLLM at {self.url} takes no adapters at run time. Start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
            )
        if status >= 400:
            raise AdapterRejectedError(label, [f"vLLM cannot load it: {told:.500}"])

    async def tokenize(self, text: str) -> list[int] | None:
        """The tokens that a text becomes there; None where vLLM was started without that door."""
        status, told = await self._post_raw("/tokenize", {"prompt": text, "add_special_tokens": True})
        if status in (401, 403, 404, 405):
            return None
        try:
            return [int(token) for token in json.loads(told)["tokens"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServingError(f"vLLM at {self.url} does not tell tokens ({status}): {_message(told)}") from error

    async def answer(self, body: Json) -> Json:
        """The whole answer to a body.

        Raises:
            AdapterGoneError: it does not know the model.
            ConfigurationError: it refuses the request.
            EngineUnreachableError, RequestTimeoutError, ServingError: it fails.
        """
        alone = self._scores_alone and "prompt_logprobs" in body
        async with self._gate.enter(alone=alone):
            prompts = body["prompt"]
            if not alone or not isinstance(prompts[0], list):
                return await self._complete(body)
            found = [await self._complete({**body, "prompt": prompt}) for prompt in prompts]
            choices = [{**one["choices"][0], "index": index} for index, one in enumerate(found)]
            return {**found[0], "choices": choices}

    async def _complete(self, body: Json) -> Json:
        status, told = await self._post_raw("/v1/completions", body)
        if status != 200:
            raise self._refusal(status, told, body)
        found: Json = json.loads(told)
        self._check_model(found, body)
        return found

    async def chunks(self, body: Json) -> AsyncGenerator[Json]:
        """The chunks of a streamed answer. Raises as `answer` does."""
        try:
            async with (
                self._gate.enter(alone=False),
                self._client.stream("POST", "/v1/completions", json=body, timeout=self._patience()) as response,
            ):
                if response.status_code != 200:
                    told = (await response.aread()).decode("utf-8", "replace")
                    raise self._refusal(response.status_code, told, body)
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return
                    if not line.startswith("data: "):
                        continue
                    chunk: Json = json.loads(line[6:])
                    if "error" in chunk:
                        error = chunk["error"]
                        raise self._refusal(int(error.get("code") or 500), json.dumps(chunk), body)
                    self._check_model(chunk, body)
                    yield chunk
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        raise self._unreachable("the answer broke off")

    def _check_model(self, answer: Json, body: Json) -> None:
        if answer.get("model") != body["model"]:
            raise ServingError(f"{body['model']} was asked for, but vLLM answered as {answer.get('model')!s:.100}.")

    def _refusal(self, status: int, told: str, body: Json) -> Exception:
        if status == 404 and body["model"] != self.base_model:
            return AdapterGoneError(f"vLLM has not got {body['model']} any more.")
        text = _message(told)
        if status in (502, 503, 504):
            return self._unreachable(text)
        if 400 <= status < 500 and status not in (401, 404):
            return ConfigurationError(f"vLLM refuses this request: {text}")
        return ServingError(f"vLLM failed on this request ({status}): {text}")

    def _unreachable(self, error: object) -> EngineUnreachableError:
        self.failed(f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error))
        return EngineUnreachableError(
            "The engine behind this server does not answer now; send the request again in a moment."
        )

    def _patience(self) -> "httpx2.Timeout":
        return httpx2.Timeout(SILENT_SECONDS, connect=5.0, pool=None)

    async def _get(self, path: str) -> tuple[int, Json]:
        try:
            response = await self._client.get(path)
            found = response.json() if response.content else {}
            return response.status_code, found if isinstance(found, dict) else {}
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        except ValueError:
            return 0, {}

    async def _post(self, path: str, body: Json) -> str:
        status, told = await self._post_raw(path, body)
        if status != 200:
            raise ServingError(f"vLLM at {self.url} refuses {path} ({status}): {_message(told)}")
        return told

    async def _post_raw(self, path: str, body: Json) -> tuple[int, str]:
        try:
            response = await self._client.post(path, json=body, timeout=self._patience())
            return response.status_code, response.text
        except httpx2.TimeoutException as error:
            raise RequestTimeoutError(f"vLLM at {self.url} did not answer {path} in time.") from error
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _message(told: str) -> str:
    """The sentence in one of vLLM's errors, at most 500 characters."""
    try:
        found = json.loads(told)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return told[:500]
