"""The OpenAI-compatible routes over an engine. `model` is the base, a reference or a blend.

Reading order: settings, auth, errors, engine_protocol, observe, dispatch, chat (tools and responses), wire (the format), admin,
models, doors, this file, server.
"""

import html
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from itertools import repeat
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from adapterhub_lite import __version__
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.sources import AdapterStore
from adapterhub_lite.serving.api.admin import admin_routes
from adapterhub_lite.serving.api.auth import Authenticate, Caller, KeyRing
from adapterhub_lite.serving.api.chat.responses import ResponsesRequest, StreamedResponse
from adapterhub_lite.serving.api.chat.tool_calls import AnswerForms, ChatDeltas, ChatPlan, length_of
from adapterhub_lite.serving.api.dispatch import BASE_NAME, Dispatcher, ResolvedModel, until_disconnect
from adapterhub_lite.serving.api.doors import HeadAsGet, lora_routes, token_routes
from adapterhub_lite.serving.api.engine_protocol import Engine
from adapterhub_lite.serving.api.errors import ApiRefusal, install_error_handlers, refuse
from adapterhub_lite.serving.api.models import model_routes
from adapterhub_lite.serving.api.observe import AccessLog, Series
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.serving.api.wire import answers
from adapterhub_lite.serving.api.wire.events import EventStream, Pieces, Streamed, StreamedAnswer
from adapterhub_lite.serving.api.wire.requests import ChatRequest, CompletionRequest, ScoreRequest
from adapterhub_lite.serving.api.wire.sampling import Sampling, StreamOptions
from adapterhub_lite.serving.engine.request import GenerationChunk, GenerationRequest, GenerationResult
from adapterhub_lite.web.guard import BodyLimit, BrowserGuard, ConnectionLimits, HeaderLimit

Json = dict[str, Any]
ABOUT = "OpenAI-compatible; each answer names the bytes that made it."
# Asked by load balancers, which have no key.
PUBLIC = ("/health", "/ready")


# Log-probabilities that the answers to one request may carry; each is some 60 bytes.
MOST_LOGPROBS = 2_000_000


def check_logprobs(asked: Sequence[GenerationRequest]) -> None:
    """Refuse what might be answered with more log-probabilities than fit, with ApiRefusal."""
    most = 0
    for one in asked:
        prompt = one.prompt or one.prompt_token_ids or "".join(str(m.get("content")) for m in one.messages or ())
        for alternatives, tokens in ((one.logprobs, one.max_new_tokens), (one.prompt_logprobs, len(prompt))):
            most += 0 if alternatives is None else (alternatives + 1) * tokens
    if most > MOST_LOGPROBS:
        text = f"logprobs: up to {most:,} may come of this, at most {MOST_LOGPROBS:,} can. Ask for fewer, or for less text."
        raise ApiRefusal(400, text, "too_many_logprobs", param="logprobs")


class Api:
    """The handlers. Each resolves the model, builds the engine's requests, and writes the answer in OpenAI's format."""

    def __init__(self, dispatcher: Dispatcher, keys: KeyRing) -> None:
        self.dispatcher, self.keys, self.settings = dispatcher, keys, dispatcher.settings
        self.forms = AnswerForms(dispatcher.engine, dispatcher.store)

    @cached_property
    def _decode(self) -> answers.Decode:
        return answers.Decode(self.dispatcher.engine.tokenizer)

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

    async def _resolve(self, model: str, caller: Caller, adapter_id: str | None = None) -> ResolvedModel:
        """What `model` means; `adapter_id` names an adapter beside the base, as LoRAX has it."""
        if adapter_id is not None and model not in (adapter_id, BASE_NAME, self.settings.base_name):
            text = f"model is {model!r} and adapter_id {adapter_id!r}, which are two adapters. Give one."
            raise ApiRefusal(400, text, "invalid_value", param="adapter_id")
        model = adapter_id or model
        return await self.dispatcher.run(partial(self.dispatcher.resolve, model, caller, through_split=True))

    # `source` is the prompt or the messages and the log-probabilities, as GenerationRequest takes them.
    def _generation(
        self, caller: Caller, body: Sampling, resolved: ResolvedModel, tokens: int | None, **source: Any
    ) -> list[GenerationRequest]:
        """The engine's requests for one prompt of a body. Raises ApiRefusal where it is beyond the server's limits."""
        limit = self.settings.max_new_tokens
        if (tokens or 0) > limit:
            text = f"{tokens} new tokens were asked for, the limit is {limit}."
            raise ApiRefusal(400, text, "too_many_tokens", param="max_tokens")
        options = body.options()
        if "grammar" in source:
            # Of calls, and of the text beside them.
            options = {key: value for key, value in options.items() if key not in body.form()}
        # Calls are not of the form that an adapter's answers have by themselves.
        options["any_form"] |= bool(source.get("tools"))
        asked = GenerationRequest(
            **options, **self._source(source), adapter=resolved.reference, tenant=caller.tenant,
            max_new_tokens=limit if tokens is None else tokens, timeout_seconds=self.settings.timeout_seconds,
        )  # fmt: skip
        # Each of several answers has a stream of random numbers of its own.
        seeds = [None if body.seed is None else (body.seed + index) % 2**63 for index in range(body.answers)]
        return [replace(asked, seed=seed) for seed in seeds]

    def _source(self, source: Json) -> Json:
        longest = self.settings.max_prompt_characters
        length = len(source.get("prompt") or "") + length_of(source.get("messages") or (), source.get("tools") or ())
        if length > longest:
            raise ApiRefusal(400, f"The prompt has {length} characters, the limit is {longest}.", "prompt_too_long")
        return source

    async def chat(self, request: Request, body: ChatRequest, caller: Caller) -> Response:
        """POST /v1/chat/completions."""
        resolved = await self._resolve(body.model, caller, body.adapter_id)
        plan = await self._plan(caller, body, resolved)
        asked = self._generation(
            caller, body, resolved, body.token_limit, logprobs=body.alternatives,
            continue_final_message=body.continue_final_message, **plan.asked(),
        )  # fmt: skip
        head = answers.envelope("chat.completion" + ".chunk" * body.stream, request.state.id, body.model, resolved)
        if body.stream:
            told = StreamedAnswer(head, self._decode, body.stream_options or StreamOptions(), plan=plan)
            return await self._stream(request, caller, resolved, asked, body.answers, told)
        results = await self._answer(request, caller, resolved, asked, body.answers)
        choices = [
            answers.chat_choice(index, result, ChatDeltas(plan), self._decode) for index, result in enumerate(results)
        ]
        scored = answers.prompt_logprobs(results[0].prompt_logprobs, self._decode)
        more = {} if scored is None else {"prompt_logprobs": scored}
        answer = head | {"choices": choices, "usage": request.state.usage} | more
        return JSONResponse(answer, headers=resolved.headers())

    async def _plan(self, caller: Caller, body: ChatRequest, resolved: ResolvedModel) -> ChatPlan:
        """How a chat is asked and its answer read; on a thread and within shares, as templates may be laid out for it."""
        plan = partial(
            ChatPlan.of, self.forms, resolved, body.messages, body.tools, body.chat_template_kwargs,
            choice=body.tool_choice or "auto", several=body.parallel_tool_calls, form=body.form(),
        )  # fmt: skip
        with self.dispatcher.admit(caller):
            return await self.dispatcher.run(plan)

    async def responses(self, request: Request, body: ResponsesRequest, caller: Caller) -> Response:
        """POST /v1/responses."""
        resolved, chat = await self._resolve(body.model, caller), body.chat()
        plan = await self._plan(caller, chat, resolved)
        asked = self._generation(caller, chat, resolved, chat.token_limit, **plan.asked())
        told = StreamedResponse(body, request.state.id, resolved, ChatDeltas(plan))
        if body.stream:
            return await self._stream(request, caller, resolved, asked, 1, told)
        (result,) = await self._answer(request, caller, resolved, asked, 1)
        return JSONResponse(told.whole(result), headers=resolved.headers())

    async def completions(self, request: Request, body: CompletionRequest, caller: Caller) -> Response:
        """POST /v1/completions."""
        resolved = await self._resolve(body.model, caller, body.adapter_id)
        asked = [
            one
            for prompt in body.prompts
            for one in self._generation(caller, body, resolved, body.max_tokens, **body.source(prompt))
        ]
        echoes = [self._text(prompt) for prompt in body.prompts for _ in range(body.answers)] if body.echo else []
        head = answers.envelope("text_completion", request.state.id, body.model, resolved)
        if body.stream:
            told = StreamedAnswer(head, self._decode, body.stream_options or StreamOptions(), echoes)
            return await self._stream(request, caller, resolved, asked, body.answers, told)
        results = await self._answer(request, caller, resolved, asked, body.answers)
        choices: list[Json] = []
        for result, echo in zip(body.best(results), echoes or repeat(None), strict=False):
            choice = answers.completion_choice(len(choices), result, self._decode, echo)
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = answers.prompt_logprobs(result.prompt_logprobs, self._decode)
            choices.append(choice)
        return JSONResponse(head | {"choices": choices, "usage": request.state.usage}, headers=resolved.headers())

    def _text(self, prompt: str | Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self.dispatcher.engine.tokenizer.decode(list(prompt)))

    async def score(self, request: Request, body: ScoreRequest, caller: Caller) -> Response:
        """POST /v1/score: how probable each choice is as the beginning of the answer."""
        resolved = await self._resolve(body.model, caller)
        source = self._source(body.source())
        asked = GenerationRequest(
            adapter=resolved.reference, tenant=caller.tenant, labels=body.choices,
            timeout_seconds=self.settings.timeout_seconds, **source,
        )  # fmt: skip
        results = await self._answer(request, caller, resolved, [asked], 1)
        answer = answers.envelope("score", request.state.id, body.model, resolved)
        choices = answers.score(body.choices, results[0])
        return JSONResponse(answer | {"choices": choices, "usage": request.state.usage}, headers=resolved.headers())

    async def _answer(
        self, request: Request, caller: Caller, resolved: ResolvedModel, asked: Sequence[GenerationRequest], each: int
    ) -> list[GenerationResult]:
        """The results, counted; each prompt is asked `each` times."""
        check_logprobs(asked)
        with self.dispatcher.admit(caller, len(asked)):
            results = await self.dispatcher.answer(request, asked)
        self._count(request, caller, resolved, results, each)
        return results

    def _count(
        self, request: Request, caller: Caller, resolved: ResolvedModel, results: Sequence[GenerationResult], each: int
    ) -> None:
        for result in results:
            self.dispatcher.count(caller, resolved.check(result))
        request.state.adapter = resolved.adapter
        request.state.usage = answers.usage(results, each)

    async def _stream(
        self, request: Request, caller: Caller, resolved: ResolvedModel, asked: Sequence[GenerationRequest], each: int,
        told: Streamed,
    ) -> Response:  # fmt: skip
        check_logprobs(asked)
        admission = ExitStack()
        admission.enter_context(self.dispatcher.admit(caller, len(asked)))
        pieces = self.dispatcher.stream_all(asked)
        try:
            # The first piece is awaited here, so that what fails at once still has its HTTP status.
            first = await until_disconnect(request, anext(pieces))
        except BaseException:
            await pieces.aclose()
            admission.close()
            raise
        events = self._events(request, caller, resolved, each, told, first, pieces)
        return EventStream(events, pieces, admission, resolved.headers())

    async def _events(
        self, request: Request, caller: Caller, resolved: ResolvedModel, each: int, told: Streamed,
        piece: tuple[int, GenerationChunk], pieces: Pieces,
    ) -> AsyncGenerator[str]:  # fmt: skip
        """`piece` and then `pieces` as server-sent events, an error as the last of them."""
        request.state.adapter = resolved.adapter
        results: dict[int, GenerationResult] = {}
        try:
            while True:
                for event in told.events(*piece):
                    yield event
                index, chunk = piece
                if chunk.result is not None:
                    results[index] = resolved.check(chunk.result)
                following = await anext(pieces, None)
                if following is None:
                    break
                piece = following
            self._count(request, caller, resolved, [results[index] for index in sorted(results)], each)
            for event in told.end(request.state.usage):
                yield event
        except Exception as error:
            request.state.failure = error
            yield told.failed(error)

    def health(self) -> JSONResponse:
        """GET /health: 200 while the process can do its work; 503 when its engine has ended, and it ends too."""
        ended = self.dispatcher.engine.ended()
        return JSONResponse({"status": "engine ended" if ended else "ok"}, 503 if ended else 200)

    def ready(self) -> JSONResponse:
        """GET /ready: 200 while requests are taken; 503 while the server drains, and while its engine cannot serve."""
        engine = self.dispatcher.engine.status()
        stopped = "engine ended" if self.dispatcher.engine.ended() else "engine unreachable"
        state = "draining" if self.dispatcher.draining else "ready" if engine.can_serve else stopped
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
    app = FastAPI(title="adapterhub-lite", version=__version__, description=ABOUT, docs_url=None, redoc_url=None)
    api = Api(Dispatcher(engine, registry, settings), keys or KeyRing.read(settings.keys))
    app.state.api = api
    _add_routes(app, api)
    install_error_handlers(app)
    # The last one added is the first to see a request.
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, refuse=refuse)
    app.add_middleware(Authenticate, keys=api.keys, public=PUBLIC)
    app.add_middleware(BrowserGuard, hosts=settings.own_hosts, content_types=("application/json",), refuse=refuse)
    app.add_middleware(HeaderLimit, limits=ConnectionLimits(), refuse=refuse)
    app.add_middleware(AccessLog, metrics=api.dispatcher.metrics)
    return app


def _add_routes(app: FastAPI, api: Api) -> None:
    user = Depends(api.caller)
    app.include_router(admin_routes(api.dispatcher, api.admin))
    app.include_router(token_routes(api.dispatcher, api.forms, api.caller))
    app.include_router(lora_routes(api.dispatcher, api.admin))
    app.include_router(model_routes(api.dispatcher, api.caller))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest, caller: Caller = user) -> Response:
        """Answer a chat."""
        return await api.chat(request, body, caller)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest, caller: Caller = user) -> Response:
        """Continue a text."""
        return await api.completions(request, body, caller)

    @app.post("/v1/score")
    async def score(request: Request, body: ScoreRequest, caller: Caller = user) -> Response:
        """Say how probable each of some texts is as the beginning of the answer."""
        return await api.score(request, body, caller)

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponsesRequest, caller: Caller = user) -> Response:
        """Answer a conversation in OpenAI's newer format, with tools, whole or streamed."""
        return await api.responses(request, body, caller)

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
