"""A pretend vLLM: its wire, its refusals and its way of loading adapters, computed by the embedded engine on a tiny base.

It takes no field that vLLM 0.32 does not have, loads adapters from the folder it is told, and forgets them when it is
killed. Faults come on order.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.serving import GenerationRequest, GenerationResult, InferenceEngine

Json = dict[str, Any]
# The fields of vLLM's CompletionRequest that may be given.
FIELDS = {
    "model", "prompt", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
    "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user",
    "use_beam_search", "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
    "spaces_between_special_tokens", "truncate_prompt_tokens", "allowed_token_ids", "prompt_logprobs",
    "add_special_tokens", "response_format", "structured_outputs", "priority", "request_id",
    "return_tokens_as_token_ids", "return_token_ids", "cache_salt", "vllm_xargs",
}  # fmt: skip
FORMS = {"json": "schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}


class PretendVllm:
    """Serves on loopback in a thread. `faults` is a list of names, each used up by one request that it fits.

    One that is `on_cpu` ends when it scores a prompt beside anything else.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        *,
        base: str = "tiny",
        max_rank: int = 16,
        key: str | None = None,
        length: int = 512,
        port: int = 0,
        on_cpu: bool = False,
    ) -> None:
        self.engine, self.base, self.max_rank, self.key, self.length = engine, base, max_rank, key, length
        self.adapters: dict[str, Path] = {}
        self.asked: Counter[str] = Counter()
        self.bodies: list[Json] = []
        self.faults: list[str] = []
        self.on_cpu = on_cpu
        self.cancelled = 0
        self.running = 0
        self.scoring = 0
        self.go_on = threading.Event()
        self._killed = threading.Event()
        self._port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the port it had before if it had one."""
        self._killed.clear()
        self.adapters.clear()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self._port))
        self._port = self._socket.getsockname()[1]
        self._socket.listen(64)
        config = uvicorn.Config(self._app(), log_config=None, lifespan="off", timeout_graceful_shutdown=0)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def kill(self) -> None:
        """Break every connection off, and listen no more: nothing is answered any more."""
        self._killed.set()
        self._break_off()
        self._server.should_exit = self._server.force_exit = True
        while self._thread.is_alive():
            self._break_off()  # also who came in this moment
            self._thread.join(0.005)
        self._socket.close()

    close = kill

    def _break_off(self) -> None:
        for connection in list(self._server.server_state.connections):
            transport = connection.transport
            if transport is not None:
                with contextlib.suppress(RuntimeError):  # its loop has ended
                    connection.loop.call_soon_threadsafe(transport.abort)

    def fault(self, *names: str) -> str | None:
        """Take the first fault that is one of `names`."""
        found = next((one for one in self.faults if one in names), None)
        if found:
            self.faults.remove(found)
        return found

    def _app(self) -> FastAPI:
        def check_key(request: Request) -> None:
            given = request.headers.get("authorization")
            if self.key and request.url.path.startswith("/v1") and given != f"Bearer {self.key}":
                raise HTTPException(401, "Unauthorized")

        app = FastAPI(dependencies=[Depends(check_key)])

        @app.get("/health")
        async def health() -> Any:
            return JSONResponse(None, 500 if self.fault("ill") else 200)

        @app.get("/v1/models")
        async def models() -> Json:
            self.asked["look"] += 1
            base = {"id": self.base, "root": "/somewhere", "parent": None, "max_model_len": self.length}
            loras = [{"id": name, "root": str(path), "parent": self.base} for name, path in self.adapters.items()]
            return {"object": "list", "data": [base, *loras]}

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> Any:
            body = await request.json()
            name, path = body["lora_name"], Path(body["lora_path"])
            self.asked[f"load {name}"] += 1
            if name in self.adapters:
                return refused(400, f"The lora adapter '{name}' has already been loaded.")
            config = json.loads((path / "adapter_config.json").read_text())
            assert not config.get("rank_pattern") and not config.get("alpha_pattern") and not config.get("use_dora")
            assert {one.name for one in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
            if config["r"] > self.max_rank:
                text = f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_rank}."
                return refused(500, text, "InternalServerError")
            await asyncio.to_thread(self.engine.load, path)
            self.adapters[name] = path
            return "Success"

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request) -> Any:
            name = (await request.json())["lora_name"]
            self.asked[f"unload {name}"] += 1
            while "slow unload" in self.faults and not self.go_on.is_set():
                await asyncio.sleep(0.01)
            if self.adapters.pop(name, None) is None:
                return refused(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
            return "Success"

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            body = await request.json()
            tokenizer = self.engine.tokenizer
            ids = tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
            ids = ids + ids[:1] if self.fault("other tokens") else ids
            return {"tokens": ids, "count": len(ids), "max_model_len": self.length}

        @app.post("/v1/completions")
        async def completions(request: Request) -> Any:
            return await self._complete(request, await request.json())

        return app

    async def _complete(self, http: Request, body: Json) -> Any:
        self.bodies.append(body)
        if strangers := body.keys() - FIELDS:
            return refused(400, f"unknown fields: {sorted(strangers)}")
        model = body["model"]
        self.asked[f"ask {model}"] += 1
        if model != self.base and model not in self.adapters:
            return refused(404, f"The model `{model}` does not exist.", "NotFoundError")
        if self.fault("overloaded"):
            return refused(503, "busy", "ServiceUnavailable")
        if self.fault("broken"):
            return refused(500, "it broke", "InternalServerError")
        if self.fault("die"):
            self.kill_soon(http)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        scoring = "prompt_logprobs" in body
        if self.on_cpu and (self.scoring or (scoring and (self.running or len(prompts) > 1))):
            self.kill_soon(http)  # as vLLM 0.32 does there
        try:
            asked = [self._request(body, prompt) for prompt in prompts]
            handles = [await asyncio.to_thread(self.engine.submit, one) for one in asked]
        except AdapterHubError as error:
            return refused(400, str(error))
        except RuntimeError:  # the loop's threads have ended with it
            if not self._killed.is_set():
                raise
            await asyncio.Event().wait()
        name = "another" if self.fault("wrong model") else model
        if body.get("stream"):
            (handle,) = handles
            return StreamingResponse(self._events(body, name, handle), media_type="text/event-stream")
        try:
            self.scoring += scoring
            results = await self._results(http, handles)
        except AdapterHubError as error:
            return refused(400, str(error))
        finally:
            self.scoring -= scoring
        choices = [
            choice(body, index, text=one.text, token_ids=one.token_ids, logprobs=one.logprobs, result=one)
            for index, one in enumerate(results)
        ]
        return {"id": "cmpl", "object": "text_completion", "model": name, "choices": choices, "usage": usage(results)}

    async def _results(self, http: Request, handles: list[Any]) -> list[GenerationResult]:
        """The results; a client that goes away cancels them, as vLLM does."""
        self.running += len(handles)
        work = asyncio.gather(*[asyncio.to_thread(handle.result) for handle in handles])
        held = self.fault("hold") is not None
        try:
            while not work.done() or (held and not self.go_on.is_set()):
                await (asyncio.sleep(0.02) if work.done() else asyncio.wait([work], timeout=0.02))
                if (held or not work.done()) and await http.is_disconnected():
                    self.cancelled += 1
                    for handle in handles:
                        handle.cancel()
                    break
            return await work
        finally:
            self.running -= len(handles)

    def kill_soon(self, http: Request) -> None:
        threading.Thread(target=self.kill, daemon=True).start()

    def _request(self, body: Json, prompt: list[int]) -> GenerationRequest:
        form = {FORMS[kind]: value for kind, value in (body.get("structured_outputs") or {}).items()}
        path = self.adapters.get(body["model"])
        return GenerationRequest(
            prompt_token_ids=prompt, adapter=path, max_new_tokens=body.get("max_tokens", 16), any_form=True,
            special_tokens=not body.get("skip_special_tokens", True),
            logit_bias={int(token): bias for token, bias in (body.get("logit_bias") or {}).items()},
            stop=tuple(body.get("stop") or ()),
            **{
                name: body[name]
                for name in ("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
                             "presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos", "logprobs",
                             "allowed_token_ids", "prompt_logprobs")
                if body.get(name) is not None
            },
            **form,
        )  # fmt: skip

    async def _events(self, body: Json, name: str, handle: Any) -> AsyncIterator[str]:
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        handle.listen(lambda item: loop.call_soon_threadsafe(inbox.put_nowait, item))
        self.running += 1
        done, count = False, 0
        try:
            while not done:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    yield event({"error": {"message": str(item), "type": "BadRequestError", "code": 400}})
                    return
                if count == 1 and self.fault("break off"):
                    return
                if count == 1 and self.fault("error in the middle"):
                    yield event({"error": {"message": "it broke", "type": "InternalServerError", "code": 500}})
                    return
                if count == 1 and self.fault("wait"):
                    while not self.go_on.is_set():
                        await asyncio.sleep(0.01)
                count, done = count + 1, item.done
                told = choice(
                    body, 0, text=item.text, token_ids=item.token_ids, logprobs=item.logprobs, result=item.result
                )
                told.pop("prompt_logprobs", None)
                yield event({"id": "cmpl", "object": "text_completion", "model": name, "choices": [told]})
            yield event({"id": "cmpl", "model": name, "choices": [], "usage": usage([item.result])})
            yield "data: [DONE]\n\n"
        finally:
            if not done:
                self.cancelled += 1
                handle.cancel()
            self.running -= 1


def choice(
    body: Json, index: int, *, text: str, token_ids: Any, logprobs: Any, result: GenerationResult | None
) -> Json:
    """One choice as vLLM writes it; token ids only where they were asked for."""
    found: Json = {
        "index": index,
        "text": text,
        "finish_reason": result.finish_reason if result else None,
        "logprobs": None,
    }
    if body.get("return_token_ids"):
        found["token_ids"] = list(token_ids)
    if body.get("logprobs") is not None:
        assert body.get("return_tokens_as_token_ids")
        told = logprobs or ()
        found["logprobs"] = {
            "tokens": [f"token_id:{one.token_id}" for one in told],
            "token_logprobs": [one.logprob for one in told],
            # The chosen token comes first, and once.
            "top_logprobs": [
                {f"token_id:{token}": value for token, value in dict([(one.token_id, one.logprob), *one.top]).items()}
                for one in told
            ],
        }
    if result is not None and result.prompt_logprobs is not None:
        found["prompt_logprobs"] = [
            None
            if one.logprob is None
            else {
                str(token): {"logprob": value} for token, value in dict([(one.token_id, one.logprob), *one.top]).items()
            }
            for one in result.prompt_logprobs
        ]
    return found


def usage(results: list[GenerationResult]) -> Json:
    prompt, written = (
        sum(getattr(one.usage, f"{kind}_tokens") for one in results) for kind in ("prompt", "completion")
    )
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def refused(status: int, text: str, kind: str = "BadRequestError") -> JSONResponse:
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": status}}, status)


def event(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"
