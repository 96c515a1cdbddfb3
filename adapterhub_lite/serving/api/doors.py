"""The smaller doors that clients of vLLM, SGLang and LoRAX knock at: tokens, version, loading and unloading by name."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version as version_of
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import Field, model_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.chat.messages import ChatMessage, Tool
from adapterhub_lite.serving.api.chat.tool_calls import AnswerForms, ChatPlan
from adapterhub_lite.serving.api.dispatch import Dispatcher
from adapterhub_lite.serving.api.errors import ApiRefusal
from adapterhub_lite.serving.api.wire.fields import ModelName, Text, WireModel, without_nulls
from adapterhub_lite.serving.engine.request import GenerationRequest

Json = dict[str, Any]
TokenId = Annotated[int, Field(ge=0, strict=True)]


class TokenizeRequest(WireModel):
    """POST /tokenize: a `prompt`, or `messages` as a chat lays them out for this model."""

    model: ModelName
    prompt: Text | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=1000)] | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=128)] = ()
    chat_template_kwargs: Json = Field(default_factory=dict)
    add_generation_prompt: Literal[True] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:  # whatever JSON holds
        return without_nulls(data, (), cls.model_fields.keys() - {"model"})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        if self.prompt is not None and (self.tools or self.chat_template_kwargs):
            raise ValueError("tools and chat_template_kwargs are for messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens is for a prompt; a chat has them from its template")
        return self


class DetokenizeRequest(WireModel):
    """POST /detokenize."""

    model: ModelName
    tokens: Annotated[tuple[TokenId, ...], Field(max_length=1_000_000)]


class LoadCommand(WireModel):
    """POST /v1/load_lora_adapter, as vLLM has it: `lora_path` is a reference of the registry, never a path."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    load_inplace: Literal[False] | None = None


class UnloadCommand(WireModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_int_id: int | None = None


def token_routes(dispatcher: Dispatcher, forms: AnswerForms, user: Callable[..., Caller]) -> APIRouter:
    """The routes that any key may use; `user` gives the caller."""
    router, engine = APIRouter(), dispatcher.engine
    caller_of = Depends(user)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, caller: Caller = caller_of) -> Json:
        """The token ids of a prompt or a chat, as this model would be asked."""
        resolved = await dispatcher.run(partial(dispatcher.resolve, body.model, caller))
        length = len(body.prompt or "") + sum(message.length for message in body.messages or ())
        if length > dispatcher.settings.max_prompt_characters:
            most = dispatcher.settings.max_prompt_characters
            raise ApiRefusal(400, f"The prompt has {length} characters, the limit is {most}.", "prompt_too_long")

        def tokens() -> list[int]:
            if body.prompt is not None and body.add_special_tokens is False:
                return list(engine.tokenizer.encode(body.prompt, add_special_tokens=False))
            if body.prompt is not None:
                return engine.encode(GenerationRequest(prompt=body.prompt, adapter=resolved.reference))
            plan = ChatPlan.of(forms, resolved, body.messages or (), body.tools, body.chat_template_kwargs)
            return engine.encode(GenerationRequest(adapter=resolved.reference, **plan.asked()))

        with dispatcher.admit(caller):
            found = await dispatcher.run(tokens)
        strings = engine.tokenizer.convert_ids_to_tokens(found) if body.return_token_strs else None
        most = engine.status().max_length
        return {"count": len(found), "max_model_len": most, "tokens": found, "token_strs": strings}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, caller: Caller = caller_of) -> Json:
        """The text of token ids."""
        await dispatcher.run(partial(dispatcher.resolve, body.model, caller))
        most = len(engine.tokenizer)
        if any(token >= most for token in body.tokens):
            text = f"tokens: this base has the tokens 0 to {most - 1}."
            raise ApiRefusal(400, text, "invalid_value", param="tokens")
        with dispatcher.admit(caller):
            return {"prompt": await dispatcher.run(engine.tokenizer.decode, list(body.tokens))}

    @router.get("/version", dependencies=[caller_of])
    def version() -> Json:
        return {"version": version_of("adapterhub-lite")}

    return router


def lora_routes(dispatcher: Dispatcher, admin: Callable[..., Caller]) -> APIRouter:
    """Loading and unloading as vLLM has it; `admin` gives the caller, or refuses everybody else."""
    router = APIRouter()
    only_admin = Depends(admin)

    @router.post("/v1/load_lora_adapter")
    def load(body: LoadCommand, caller: Caller = only_admin) -> PlainTextResponse:
        """Bring an adapter of the registry into memory."""
        wanted = dispatcher.manifest(body.lora_name, caller)
        found = dispatcher.manifest(body.lora_path or body.lora_name, caller)
        if found.digest != wanted.digest:
            text = (
                f"{body.lora_name!r} is {wanted.reference} in the registry, and {body.lora_path!r} is {found.reference}. Names "
                "are the registry's: ask for it by its own name, or move an alias."
            )
            raise ApiRefusal(400, text, "invalid_value", param="lora_path")
        dispatcher.load(body.lora_name, caller)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    def unload(body: UnloadCommand, caller: Caller = only_admin) -> PlainTextResponse:
        """Take an adapter out of memory; requests in work finish first."""
        manifest = dispatcher.manifest(body.lora_name, caller)
        if not dispatcher.engine.unload(manifest.reference):
            text = f"The adapter {body.lora_name!r} is not in memory."
            raise ApiRefusal(404, text, "adapter_not_loaded", param="lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


class HeadAsGet:
    """Answers HEAD wherever there is GET; the server itself leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on HEAD as GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        inner = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send)
        finally:
            # The log names the route.
            scope["route"] = inner.get("route")
