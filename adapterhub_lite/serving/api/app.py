"""The OpenAI-compatible routes over an engine. `model` is the base, a reference or a blend.

Reading order: settings, auth, errors, engine_protocol, observe, dispatch, wire, sampling, schema, answers, admin, this
file, server.
"""

import html
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.sources import AdapterStore
from adapterhub_lite.serving.api import answers
from adapterhub_lite.serving.api.admin import admin_routes
from adapterhub_lite.serving.api.auth import Authenticate, Caller, KeyRing
from adapterhub_lite.serving.api.dispatch import Dispatcher, ResolvedModel, until_disconnect
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.errors import ApiRefusal, error_event, install_error_handlers, refuse
from adapterhub_lite.serving.api.observe import AccessLog, Series
from adapterhub_lite.serving.api.sampling import Sampling
from adapterhub_lite.serving.api.schema import ChatRequest, CompletionRequest
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.serving.engine.request import GenerationChunk, GenerationRequest, GenerationResult
from adapterhub_lite.web.guard import BodyLimit, BrowserGuard, ConnectionLimits, HeaderLimit

Json = dict[str, Any]
CHAT_TOKENS = 256
ABOUT = "OpenAI-compatible; each answer names the bytes that made it."
# Asked by load balancers, which have no key.
PUBLIC = ("/health", "/ready")


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
        self.dispatcher, self.keys, self.settings = dispatcher, keys, dispatcher.settings

    def caller(self, request: Request) -> Caller:
        """The caller, by the key it gave. Raises ApiRefusal 403 for the key that only reads metrics."""
        caller: Caller = request.state.caller
        if caller.metrics_only:
            raise ApiRefusal(403, "This key reads /metrics and nothing else.", "metrics_only")
        return caller

    def admin(self, request: Request) -> Caller:
        """The admin, or ApiRefusal 403 with another's key, or where there is no admin."""
        caller = self.caller(request)
        if not caller.admin:
            raise ApiRefusal(403, "This needs the admin key that the file of keys names.", "admin_only")
        return caller

    async def _resolve(self, model: str, caller: Caller) -> ResolvedModel:
        return await self.dispatcher.run(partial(self.dispatcher.resolve, model, caller, through_split=True))

    # `source` is the prompt or the messages and the log-probabilities, as GenerationRequest takes them.
    def _generation(
        self, caller: Caller, body: Sampling, resolved: ResolvedModel, tokens: int | None, **source: Any
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
            stop=body.stops, timeout_seconds=self.settings.timeout_seconds, tenant=caller.tenant, **body.form(),
            **source,
        )  # fmt: skip

    def _decode(self, token_id: int) -> str:
        return str(self.dispatcher.engine.tokenizer.decode([token_id]))

    async def chat(self, request: Request, body: ChatRequest, caller: Caller) -> Response:
        """POST /v1/chat/completions."""
        resolved = await self._resolve(body.model, caller)
        messages = [message.plain() for message in body.messages]
        asked = self._generation(
            caller, body, resolved, body.token_limit, messages=messages, logprobs=body.alternatives
        )
        if body.stream:
            return await self._stream(request, caller, body, resolved, asked, "chat.completion.chunk")
        with self.dispatcher.admit(caller):
            results = await self.dispatcher.answer(request, [asked])
        self._count(request, caller, resolved, results)
        answer = answers.envelope("chat.completion", request.state.id, body.model, resolved)
        answer |= {"choices": [answers.chat_choice(results[0], self._decode)], "usage": answers.usage(results)}
        return JSONResponse(answer, headers=resolved.headers())

    async def completions(self, request: Request, body: CompletionRequest, caller: Caller) -> Response:
        """POST /v1/completions."""
        resolved = await self._resolve(body.model, caller)
        asked = [
            self._generation(caller, body, resolved, body.token_limit, prompt=prompt, logprobs=body.logprobs)
            for prompt in body.prompts
        ]
        if body.stream:
            if len(asked) != 1:
                raise ApiRefusal(400, "A stream answers one prompt at a time.", "invalid_value", param="prompt")
            return await self._stream(request, caller, body, resolved, asked[0], "text_completion")
        with self.dispatcher.admit(caller, len(asked)):
            results = await self.dispatcher.answer(request, asked)
        self._count(request, caller, resolved, results)
        answer = answers.envelope("text_completion", request.state.id, body.model, resolved)
        choices = [answers.completion_choice(index, result, self._decode) for index, result in enumerate(results)]
        return JSONResponse(answer | {"choices": choices, "usage": answers.usage(results)}, headers=resolved.headers())

    def _count(
        self, request: Request, caller: Caller, resolved: ResolvedModel, results: Sequence[GenerationResult]
    ) -> None:
        for result in results:
            self.dispatcher.count(caller, resolved.check(result))
        request.state.adapter = resolved.adapter
        request.state.usage = answers.usage(results)

    async def _stream(
        self, request: Request, caller: Caller, body: Sampling, resolved: ResolvedModel, asked: GenerationRequest,
        kind: str,
    ) -> Response:  # fmt: skip
        admission = ExitStack()
        admission.enter_context(self.dispatcher.admit(caller))
        chunks = self.dispatcher.stream(asked)
        try:
            # The first chunk is awaited here, so that what fails at once still has its HTTP status.
            first = await until_disconnect(request, anext(chunks))
        except BaseException:
            await chunks.aclose()
            admission.close()
            raise

        events = self._events(request, caller, body, resolved, kind, first, chunks)
        return EventStream(events, chunks, admission, resolved.headers())

    async def _events(
        self, request: Request, caller: Caller, body: Sampling, resolved: ResolvedModel, kind: str,
        chunk: GenerationChunk, chunks: AsyncIterator[GenerationChunk],
    ) -> AsyncGenerator[str]:  # fmt: skip
        """`chunk` and then `chunks` as server-sent events, an error as the last of them."""
        head, chat = answers.envelope(kind, request.state.id, body.model, resolved), kind.startswith("chat")
        request.state.adapter = resolved.adapter
        piece: Callable[..., Json] = answers.chat_piece if chat else answers.completion_piece
        logprobs = answers.chat_logprobs if chat else answers.completion_logprobs
        try:
            if chat:
                yield answers.event(head | {"choices": [answers.chat_piece(None, first=True)]})
            while chunk.result is None:
                yield answers.event(head | {"choices": [piece(chunk.text)]})
                chunk = await anext(chunks)
            self._count(request, caller, resolved, [chunk.result])
            reason, details = chunk.result.finish_reason, logprobs(chunk.result.logprobs, self._decode)
            yield answers.event(head | {"choices": [piece(chunk.text, reason=reason, logprobs=details)]})
            if body.stream_options and body.stream_options.include_usage:
                yield answers.event(head | {"choices": [], "usage": answers.usage([chunk.result])})
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

    def health(self) -> JSONResponse:
        """GET /health: 200 while the process can do its work; 503 when its engine has ended, and it ends too."""
        ended = self.dispatcher.engine.ended()
        return JSONResponse({"status": "engine ended" if ended else "ok"}, 503 if ended else 200)

    def ready(self) -> JSONResponse:
        """GET /ready: 200 while requests are taken; 503 while the server drains, and when the engine has ended."""
        engine = self.dispatcher.engine.status()
        state = "draining" if self.dispatcher.draining else "ready" if engine.can_serve else "engine ended"
        counts = {"resident": engine.resident, "waiting": engine.waiting, "can_pull": engine.can_pull}
        return JSONResponse({"status": state, **counts}, 200 if state == "ready" else 503)

    def metrics(self, request: Request) -> Response:
        """GET /metrics: everything to the admin's and the metrics key, and without keys; to another key its own."""
        caller: Caller = request.state.caller
        series: Series = self.dispatcher.metrics
        if self.keys.open or caller.admin or caller.metrics_only:
            self.dispatcher.metrics.draining.set(int(self.dispatcher.draining))
            self.dispatcher.metrics.update(self.dispatcher.engine.status(), dict(self.dispatcher.shares.in_work))
        else:
            series = self.dispatcher.metrics.own(caller.label)
        return Response(series.text(), media_type="text/plain; version=0.0.4")


def create_api(
    engine: Engine, registry: AdapterStore, settings: ServerSettings, keys: KeyRing | None = None
) -> FastAPI:
    """The server as an ASGI application. `app.state.api` is its `Api`, whose dispatcher holds threads: close it.

    Raises:
        ConfigurationError: the base has the name of an adapter.
    """
    if "/" not in settings.base_name and any(settings.base_name == one.name for one in registry.list()):
        raise ConfigurationError(f"{settings.base_name!r} is the name of an adapter too; give the base another name.")
    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(title="adapterhub-lite", description=ABOUT, docs_url=None, redoc_url=None)
    api = Api(Dispatcher(engine, registry, settings), keys or KeyRing.read(settings.keys))
    app.state.api = api
    _add_routes(app, api)
    install_error_handlers(app)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, refuse=refuse)
    app.add_middleware(Authenticate, keys=api.keys, public=PUBLIC)
    app.add_middleware(BrowserGuard, hosts=settings.own_hosts, content_types=("application/json",), refuse=refuse)
    app.add_middleware(HeaderLimit, limits=ConnectionLimits(), refuse=refuse)
    app.add_middleware(AccessLog, metrics=api.dispatcher.metrics)
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

    app.get("/health")(api.health)
    app.get("/ready")(api.ready)
    app.get("/metrics")(api.metrics)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(documentation(app), headers={"Content-Security-Policy": "default-src 'none'"})


def documentation(app: FastAPI) -> str:
    """A page that lists the routes with their fields, without any script."""
    schemas = app.openapi().get("components", {}).get("schemas", {})
    parts = [f"<!doctype html><title>{app.title}</title><h1>{app.title}</h1><p>{html.escape(app.description)}</p>"]
    for path, methods in app.openapi()["paths"].items():
        for method, route in methods.items():
            text = html.escape(route.get("description") or route.get("summary") or "")
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{text}</p>")
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = schemas.get(body.get("$ref", "").rpartition("/")[2], {}).get("properties", {})
            parts.append("<ul>" + "".join(f"<li>{html.escape(field)}</li>" for field in fields) + "</ul>")
    return "".join(parts) + '<p>The same for programs: <a href="/openapi.json">/openapi.json</a>.</p>'
