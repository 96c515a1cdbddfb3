"""What is served: GET /v1/models and /v1/models/{name}, by name, version and alias."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Depends

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.dispatch import Dispatcher

Json = dict[str, Any]


def model_routes(dispatcher: Dispatcher, user: Callable[..., Caller]) -> APIRouter:
    """The routes under /v1/models; `user` gives the caller."""
    router = APIRouter()
    caller_of = Depends(user)

    @router.get("/v1/models")
    def models(caller: Caller = caller_of) -> Json:
        """The base, and each name, version and alias that this caller may use on this base."""
        return {"object": "list", "data": _served(dispatcher, caller)}

    @router.get("/v1/models/{name:path}")
    def model(name: str, caller: Caller = caller_of) -> Json:
        """What a name or a blend means now."""
        resolved = dispatcher.resolve(name, caller)
        digest = resolved.digest
        single = digest is not None and not set(digest) & set("+*")
        told = _model(dispatcher, name, dispatcher.store.resolve(str(digest)) if single else None)
        return told | {"receipt": {"adapter_digest": digest, "base_fingerprint": resolved.base}}

    return router


def _served(dispatcher: Dispatcher, caller: Caller) -> list[Json]:
    found = [_model(dispatcher, dispatcher.settings.base_name)]
    newest: dict[str, AdapterManifest] = {}
    for manifest in dispatcher.store.list():
        fits = manifest.base.fingerprint == dispatcher.engine.base_fingerprint
        if fits and dispatcher.serves(manifest.name) and caller.may_use(manifest.name):
            newest[manifest.name] = manifest
            found.append(_model(dispatcher, manifest.reference, manifest))
    for name in sorted(newest):
        # A bare name is its newest version, which another base may have.
        found.append(_model(dispatcher, name, dispatcher.store.resolve(name)))
        for alias, version in dispatcher.store.aliases(name).items():
            found.append(_model(dispatcher, f"{name}@{alias}", dispatcher.store.resolve(f"{name}:{version}")))
    return found


def _model(dispatcher: Dispatcher, name: str, manifest: AdapterManifest | None = None) -> Json:
    """A model as OpenAI lists it; of an adapter also its version, the `root`, and its base, the `parent`."""
    digest = None if manifest is None else manifest.digest
    receipt = {"adapter_digest": digest, "base_fingerprint": dispatcher.engine.base_fingerprint}
    told: Json = {"id": name, "object": "model", "created": 0, "owned_by": "adapterhub-lite", "receipt": receipt}
    if manifest is not None:
        created = int(datetime.fromisoformat(manifest.created).timestamp())
        told |= {"created": created, "root": manifest.reference, "parent": dispatcher.settings.base_name}
    return told
