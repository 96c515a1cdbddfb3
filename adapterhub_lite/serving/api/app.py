"""The OpenAI-compatible front of an engine: routes only. `model` is the base, a reference or a blend.

Reading order: api_settings, api_models, api_auth, api_errors, api_metrics, api_engine, api_desk, api_format, api_log,
api_admin, this file, api_server.
"""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.api import responses as form
from adapterhub_lite.serving.api.admin import admin_routes
from adapterhub_lite.serving.api.auth import Caller, KeyRing
from adapterhub_lite.serving.api.dispatch import Desk, Pinned, unless_gone
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.errors import ApiRefusal, error_event, install_error_handlers
from adapterhub_lite.serving.api.middleware import AccessLog, BodyLimit
from adapterhub_lite.serving.api.schema import ChatRequest, CompletionRequest, Sampling
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.serving.engine.request import GenerationChunk, GenerationRequest

Json = dict[str, Any]
CHAT_TOKENS = 256


class EventStream(StreamingResponse):
    """Server-sent events; however the connection ends, even before the first, source and place are given back."""

    def __init__(
        self, events: AsyncGenerator[str], source: AsyncGenerator[Any], place: ExitStack, headers: dict[str, str]
    ) -> None:
        self._events, self._source, self._place = events, source, place
        super().__init__(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._source.aclose()
            self._place.close()


class Api:
    """The handlers over one desk."""

    def __init__(self, desk: Desk, keys: KeyRing) -> None:
        self.desk, self.keys, self.settings, self.draining = desk, keys, desk.settings, False

    def caller(self, request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
        """Who is asking. Raises ApiRefusal 401 for a missing or wrong key."""
        found = self.keys.caller(authorization)
        if found is None:
            told = "is not known" if authorization else "is missing"
            raise ApiRefusal(401, f"The API key {told}: send 'Authorization: Bearer <key>'.", "invalid_api_key")
        request.state.caller = found.label
        return found

    def admin(self, request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
        """The admin, or ApiRefusal: 401 without a key, 403 with another's, or where there is no admin."""
        found = self.caller(request, authorization)
        if not found.admin:
            raise ApiRefusal(403, "This needs the admin key, which the file of keys names.", "admin_only")
        return found

    def wish(self, body: Sampling, pinned: Pinned, tokens: int | None, **source: Any) -> GenerationRequest:
        """The engine's request for a body. Raises ApiRefusal where it is beyond the server's limits."""
        limit, longest = self.settings.max_new_tokens, self.settings.max_prompt_characters
        if (tokens or 1) > limit:
            raise ApiRefusal(400, f"{tokens} tokens were asked for, at most {limit} are made.", "too_many_tokens")
        said = source.get("prompt") or "".join(message["content"] for message in source.get("messages") or ())
        if len(said) > longest:
            raise ApiRefusal(
                400, f"The prompt has {len(said)} characters, at most {longest} are read.", "prompt_too_long"
            )
        return GenerationRequest(
            adapter=pinned.reference, max_new_tokens=tokens or min(CHAT_TOKENS, limit), temperature=body.temperature,
            top_p=body.top_p, top_k=body.top_k, repetition_penalty=body.repetition_penalty, seed=body.seed,
            stop=body.stops, timeout_seconds=self.settings.timeout_seconds, **source,
        )  # fmt: skip

    def decode(self, token_id: int) -> str:
        """The text of one token."""
        return str(self.desk.engine.tokenizer.decode([token_id]))

    async def chat(self, request: Request, body: ChatRequest, caller: Caller) -> Response:
        """POST /v1/chat/completions."""
        pinned = await self.desk.run(partial(self.desk.pin, body.model, caller, through_split=True))
        messages = [message.plain() for message in body.messages]
        wish = self.wish(body, pinned, body.wanted_tokens, messages=messages, logprobs=body.wanted_logprobs)
        if body.stream:
            return await self._stream(request, body, pinned, wish, "chat.completion.chunk")
        with self.desk.place():
            (result,) = await self.desk.answer(request, [wish])
        self._count(request, pinned, [result])
        answer = form.envelope("chat.completion", request.state.id, body.model, pinned)
        answer |= {"choices": [form.chat_choice(result, self.decode)], "usage": form.usage([result])}
        return JSONResponse(answer, headers=pinned.headers())

    async def completions(self, request: Request, body: CompletionRequest, caller: Caller) -> Response:
        """POST /v1/completions."""
        pinned = await self.desk.run(partial(self.desk.pin, body.model, caller, through_split=True))
        wishes = [
            self.wish(body, pinned, body.wanted_tokens, prompt=prompt, logprobs=body.logprobs)
            for prompt in body.prompts
        ]
        if body.stream:
            if len(wishes) != 1:
                raise ApiRefusal(400, "A stream answers one prompt at a time.", "invalid_value", param="prompt")
            return await self._stream(request, body, pinned, wishes[0], "text_completion")
        with self.desk.place():
            results = await self.desk.answer(request, wishes)
        self._count(request, pinned, results)
        answer = form.envelope("text_completion", request.state.id, body.model, pinned)
        choices = [form.completion_choice(index, result, self.decode) for index, result in enumerate(results)]
        return JSONResponse(answer | {"choices": choices, "usage": form.usage(results)}, headers=pinned.headers())

    def _count(self, request: Request, pinned: Pinned, results: list[Any]) -> None:
        for result in results:
            self.desk.metrics.answered(pinned.prove(result))
        request.state.adapter = pinned.adapter
        request.state.usage = form.usage(results)

    async def _stream(
        self, request: Request, body: Sampling, pinned: Pinned, wish: GenerationRequest, kind: str
    ) -> Response:
        stack = ExitStack()
        stack.enter_context(self.desk.place())
        chunks = self.desk.stream(wish)
        try:
            # The first chunk is awaited here, so that what fails at once still has its HTTP status.
            first = await unless_gone(request, anext(chunks))
        except BaseException:
            await chunks.aclose()
            stack.close()
            raise
        events = self._events(request, body, pinned, kind, first, chunks)
        return EventStream(events, chunks, stack, pinned.headers())

    async def _events(
        self, request: Request, body: Sampling, pinned: Pinned, kind: str, chunk: GenerationChunk,
        chunks: AsyncIterator[GenerationChunk],
    ) -> AsyncGenerator[str]:  # fmt: skip
        head, chat = form.envelope(kind, request.state.id, body.model, pinned), kind.startswith("chat")
        request.state.adapter = pinned.adapter
        piece: Callable[..., Json] = form.chat_piece if chat else form.completion_piece
        logprobs = form.chat_logprobs if chat else form.completion_logprobs
        try:
            if chat:
                yield form.event(head | {"choices": [form.chat_piece(None, first=True)]})
            while not chunk.done:
                yield form.event(head | {"choices": [piece(chunk.text)]})
                chunk = await anext(chunks)
            assert chunk.result is not None
            self._count(request, pinned, [chunk.result])
            told = logprobs(chunk.result.logprobs, self.decode)
            last = piece(chunk.text, reason=chunk.result.finish_reason, logprobs=told)
            yield form.event(head | {"choices": [last]})
            if body.stream_options and body.stream_options.include_usage:
                yield form.event(head | {"choices": [], "usage": form.usage([chunk.result])})
            yield "data: [DONE]\n\n"
        except Exception as error:
            request.state.failure = error
            yield error_event(error)

    def models(self, caller: Caller) -> Json:
        """GET /v1/models: the base, and each version and alias that this caller may use on this base."""
        found = [self._model(self.settings.base_name, None)]
        names: set[str] = set()
        for manifest in self.desk.registry.list():
            fits = manifest.base.fingerprint == self.desk.engine.base_fingerprint
            if fits and self.desk.serves(manifest.name) and caller.may_use(manifest.name):
                names.add(manifest.name)
                found.append(self._model(manifest.reference, manifest.digest))
        for name in sorted(names):
            for alias, version in self.desk.registry.aliases(name).items():
                found.append(self._model(f"{name}@{alias}", self.desk.registry.resolve(f"{name}:{version}").digest))
        return {"object": "list", "data": found}

    def model(self, name: str, caller: Caller) -> Json:
        """GET /v1/models/{name}: what a name or a blend means now."""
        return self._model(name, self.desk.pin(name, caller).digest)

    def _model(self, name: str, digest: str | None) -> Json:
        receipt = {"adapter_digest": digest, "base_fingerprint": self.desk.engine.base_fingerprint}
        return {"id": name, "object": "model", "created": 0, "owned_by": "adapterhub-lite", "receipt": receipt}

    def ready(self) -> JSONResponse:
        """GET /ready: 200 while requests are taken; 503 while the server drains, and when the engine has ended."""
        engine = self.desk.engine.status()
        said = "draining" if self.draining else "ready" if engine.can_serve else "engine ended"
        told = {"status": said, "resident": engine.resident, "waiting": engine.waiting, "can_pull": engine.can_pull}
        return JSONResponse(told, 200 if said == "ready" else 503)

    def metrics(self) -> Response:
        """GET /metrics."""
        self.desk.metrics.look(self.desk.engine.status())
        return Response(self.desk.metrics.text(), media_type="text/plain; version=0.0.4")


def create_api(engine: Engine, registry: Any, settings: ServerSettings, keys: KeyRing | None = None) -> FastAPI:
    """The server as an ASGI application. `app.state.api` is its `Api`, whose desk holds threads: close it at the end.

    Raises:
        ConfigurationError: the base's name would be taken for an adapter's.
    """
    if "/" not in settings.base_name and any(settings.base_name == one.name for one in registry.list()):
        raise ConfigurationError(f"{settings.base_name!r} is the name of an adapter too; name the base otherwise.")
    app = FastAPI(title="adapterhub-lite", description="OpenAI-compatible; each answer says what produced it.")
    api = Api(Desk(engine, registry, settings), keys or KeyRing.read(settings.keys))
    app.state.api = api
    _add_routes(app, api)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(AccessLog, metrics=api.desk.metrics, new_id=lambda: uuid.uuid4().hex)
    return app


def _add_routes(app: FastAPI, api: Api) -> None:
    user = Depends(api.caller)
    app.include_router(admin_routes(api.desk, api.admin))

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
