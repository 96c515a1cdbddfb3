"""The OpenAI-compatible routes over an engine. `model` is the base, a reference or a blend.

Reading order: settings, auth, errors, engine_protocol, observe, dispatch, schema, middleware, admin, this file, server.
"""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.sources import AdapterStore
from adapterhub_lite.serving.api import schema
from adapterhub_lite.serving.api.admin import admin_routes
from adapterhub_lite.serving.api.auth import Caller, KeyRing
from adapterhub_lite.serving.api.dispatch import Dispatcher, ResolvedModel, until_disconnect
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.errors import ApiRefusal, error_event, install_error_handlers
from adapterhub_lite.serving.api.middleware import BodyLimit
from adapterhub_lite.serving.api.observe import AccessLog
from adapterhub_lite.serving.api.schema import ChatRequest, CompletionRequest, Sampling
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.serving.engine.request import GenerationChunk, GenerationRequest, GenerationResult

Json = dict[str, Any]
CHAT_TOKENS = 256


class EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, even before the first event, what it held is released."""

    def __init__(
        self,
        events: AsyncGenerator[str],
        chunks: AsyncGenerator[GenerationChunk],
        admission: ExitStack,
        headers: dict[str, str],
    ) -> None:
        self._events, self._chunks, self._admission = events, chunks, admission
        super().__init__(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._chunks.aclose()
            self._admission.close()


class Api:
    """The handlers. Each resolves the model, builds the engine's requests, and writes the answer in OpenAI's format."""

    def __init__(self, dispatcher: Dispatcher, keys: KeyRing) -> None:
        self.dispatcher, self.keys, self.settings, self.draining = dispatcher, keys, dispatcher.settings, False

    def caller(self, request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
        """The caller by its key. Raises ApiRefusal 401 for a missing or wrong key."""
        found = self.keys.caller(authorization)
        if found is None:
            problem = "is not known" if authorization else "is missing"
            raise ApiRefusal(401, f"The API key {problem}: send 'Authorization: Bearer <key>'.", "invalid_api_key")
        request.state.caller = found.label
        return found

    def admin(self, request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
        """The admin, or ApiRefusal: 401 without a key, 403 with another's, or where there is no admin."""
        found = self.caller(request, authorization)
        if not found.admin:
            raise ApiRefusal(403, "This needs the admin key that the file of keys names.", "admin_only")
        return found

    async def _resolve(self, model: str, caller: Caller) -> ResolvedModel:
        return await self.dispatcher.run(partial(self.dispatcher.resolve, model, caller, through_split=True))

    # `source` is the prompt or the messages and the log-probabilities, as GenerationRequest takes them.
    def _generation(
        self, body: Sampling, resolved: ResolvedModel, tokens: int | None, **source: Any
    ) -> GenerationRequest:
        """The engine's request for a body. Raises ApiRefusal where it is beyond the server's limits."""
        limit, longest = self.settings.max_new_tokens, self.settings.max_prompt_characters
        if (tokens or 1) > limit:
            raise ApiRefusal(400, f"{tokens} new tokens were asked for, the limit is {limit}.", "too_many_tokens")
        length = len(source.get("prompt") or "") + sum(len(m["content"]) for m in source.get("messages") or ())
        if length > longest:
            raise ApiRefusal(400, f"The prompt has {length} characters, the limit is {longest}.", "prompt_too_long")
        return GenerationRequest(
            adapter=resolved.reference, max_new_tokens=tokens or min(CHAT_TOKENS, limit), temperature=body.temperature,
            top_p=body.top_p, top_k=body.top_k, repetition_penalty=body.repetition_penalty, seed=body.seed,
            stop=body.stops, timeout_seconds=self.settings.timeout_seconds, **source,
        )  # fmt: skip

    def _decode(self, token_id: int) -> str:
        return str(self.dispatcher.engine.tokenizer.decode([token_id]))

    async def chat(self, request: Request, body: ChatRequest, caller: Caller) -> Response:
        """POST /v1/chat/completions."""
        resolved = await self._resolve(body.model, caller)
        messages = [message.plain() for message in body.messages]
        asked = self._generation(body, resolved, body.token_limit, messages=messages, logprobs=body.alternatives)
        if body.stream:
            return await self._stream(request, body, resolved, asked, "chat.completion.chunk")
        with self.dispatcher.admit():
            results = await self.dispatcher.answer(request, [asked])
        self._count(request, resolved, results)
        answer = schema.envelope("chat.completion", request.state.id, body.model, resolved)
        answer |= {"choices": [schema.chat_choice(results[0], self._decode)], "usage": schema.usage(results)}
        return JSONResponse(answer, headers=resolved.headers())

    async def completions(self, request: Request, body: CompletionRequest, caller: Caller) -> Response:
        """POST /v1/completions."""
        resolved = await self._resolve(body.model, caller)
        asked = [
            self._generation(body, resolved, body.token_limit, prompt=prompt, logprobs=body.logprobs)
            for prompt in body.prompts
        ]
        if body.stream:
            if len(asked) != 1:
                raise ApiRefusal(400, "A stream answers one prompt at a time.", "invalid_value", param="prompt")
            return await self._stream(request, body, resolved, asked[0], "text_completion")
        with self.dispatcher.admit():
            results = await self.dispatcher.answer(request, asked)
        self._count(request, resolved, results)
        answer = schema.envelope("text_completion", request.state.id, body.model, resolved)
        choices = [schema.completion_choice(index, result, self._decode) for index, result in enumerate(results)]
        return JSONResponse(answer | {"choices": choices, "usage": schema.usage(results)}, headers=resolved.headers())

    def _count(self, request: Request, resolved: ResolvedModel, results: Sequence[GenerationResult]) -> None:
        for result in results:
            self.dispatcher.metrics.answered(resolved.check(result))
        request.state.adapter = resolved.adapter
        request.state.usage = schema.usage(results)

    async def _stream(
        self, request: Request, body: Sampling, resolved: ResolvedModel, asked: GenerationRequest, kind: str
    ) -> Response:
        admission = ExitStack()
        admission.enter_context(self.dispatcher.admit())
        chunks = self.dispatcher.stream(asked)
        try:
            # The first chunk is awaited here, so that what fails at once still has its HTTP status.
            first = await until_disconnect(request, anext(chunks))
        except BaseException:
            await chunks.aclose()
            admission.close()
            raise

        events = self._events(request, body, resolved, kind, first, chunks)
        return EventStream(events, chunks, admission, resolved.headers())

    async def _events(
        self, request: Request, body: Sampling, resolved: ResolvedModel, kind: str, chunk: GenerationChunk,
        chunks: AsyncIterator[GenerationChunk],
    ) -> AsyncGenerator[str]:  # fmt: skip
        """`chunk` and then `chunks` as server-sent events, an error as the last of them."""
        head, chat = schema.envelope(kind, request.state.id, body.model, resolved), kind.startswith("chat")
        request.state.adapter = resolved.adapter
        piece: Callable[..., Json] = schema.chat_piece if chat else schema.completion_piece
        logprobs = schema.chat_logprobs if chat else schema.completion_logprobs
        try:
            if chat:
                yield schema.event(head | {"choices": [schema.chat_piece(None, first=True)]})
            while chunk.result is None:
                yield schema.event(head | {"choices": [piece(chunk.text)]})
                chunk = await anext(chunks)
            self._count(request, resolved, [chunk.result])
            reason, details = chunk.result.finish_reason, logprobs(chunk.result.logprobs, self._decode)
            yield schema.event(head | {"choices": [piece(chunk.text, reason=reason, logprobs=details)]})
            if body.stream_options and body.stream_options.include_usage:
                yield schema.event(head | {"choices": [], "usage": schema.usage([chunk.result])})
            yield "data: [DONE]\n\n"
        except Exception as error:
            request.state.failure = error
            yield error_event(error)

    def models(self, caller: Caller) -> Json:
        """GET /v1/models: the base, and each version and alias that this caller may use on this base."""
        found = [self._model(self.settings.base_name, None)]
        names: set[str] = set()
        for manifest in self.dispatcher.store.list():
            fits = manifest.base.fingerprint == self.dispatcher.engine.base_fingerprint
            if fits and self.dispatcher.serves(manifest.name) and caller.may_use(manifest.name):
                names.add(manifest.name)
                found.append(self._model(manifest.reference, manifest.digest))
        for name in sorted(names):
            for alias, version in self.dispatcher.store.aliases(name).items():
                found.append(self._model(f"{name}@{alias}", self.dispatcher.store.resolve(f"{name}:{version}").digest))
        return {"object": "list", "data": found}

    def model(self, name: str, caller: Caller) -> Json:
        """GET /v1/models/{name}: what a name or a blend means now."""
        return self._model(name, self.dispatcher.resolve(name, caller).digest)

    def _model(self, name: str, digest: str | None) -> Json:
        receipt = {"adapter_digest": digest, "base_fingerprint": self.dispatcher.engine.base_fingerprint}
        return {"id": name, "object": "model", "created": 0, "owned_by": "adapterhub-lite", "receipt": receipt}

    def ready(self) -> JSONResponse:
        """GET /ready: 200 while requests are taken; 503 while the server drains, and when the engine has ended."""
        engine = self.dispatcher.engine.status()
        state = "draining" if self.draining else "ready" if engine.can_serve else "engine ended"
        counts = {"resident": engine.resident, "waiting": engine.waiting, "can_pull": engine.can_pull}
        return JSONResponse({"status": state, **counts}, 200 if state == "ready" else 503)

    def metrics(self) -> Response:
        """GET /metrics."""
        self.dispatcher.metrics.update(self.dispatcher.engine.status())
        return Response(self.dispatcher.metrics.text(), media_type="text/plain; version=0.0.4")


def create_api(
    engine: Engine, registry: AdapterStore, settings: ServerSettings, keys: KeyRing | None = None
) -> FastAPI:
    """The server as an ASGI application. `app.state.api` is its `Api`, whose dispatcher holds threads: close it.

    Raises:
        ConfigurationError: the base has the name of an adapter.
    """
    if "/" not in settings.base_name and any(settings.base_name == one.name for one in registry.list()):
        raise ConfigurationError(f"{settings.base_name!r} is the name of an adapter too; give the base another name.")
    app = FastAPI(title="adapterhub-lite", description="OpenAI-compatible; each answer names the bytes that made it.")
    api = Api(Dispatcher(engine, registry, settings), keys or KeyRing.read(settings.keys))
    app.state.api = api
    _add_routes(app, api)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(AccessLog, metrics=api.dispatcher.metrics, new_id=lambda: uuid.uuid4().hex)
    return app


def _add_routes(app: FastAPI, api: Api) -> None:
    user = Depends(api.caller)
    app.include_router(admin_routes(api.dispatcher, api.admin))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest, caller: Caller = user) -> Response:
        return await api.chat(request, body, caller)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest, caller: Caller = user) -> Response:
        return await api.completions(request, body, caller)

    @app.get("/v1/models")
    def models(caller: Caller = user) -> Json:
        return api.models(caller)

    @app.get("/v1/models/{name:path}")
    def model(name: str, caller: Caller = user) -> Json:
        return api.model(name, caller)

    @app.get("/health")
    def health() -> Json:
        return {"status": "ok"}

    app.get("/ready")(api.ready)
    app.get("/metrics", dependencies=[user])(api.metrics)
