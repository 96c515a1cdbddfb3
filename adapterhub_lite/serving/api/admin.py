"""What only the admin's key may do: load and unload adapters, move aliases, start and end splits.

By reference (`name@version` and the like) only; a path or a URL is none.
"""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends

from adapterhub_lite.adapter_format.reference import AdapterReference
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.dispatch import Desk
from adapterhub_lite.serving.api.schema import AdapterCommand, AliasCommand, SplitCommand

Json = dict[str, Any]
SHOWN = ("name", "digest", "rank", "modules", "nbytes", "uses", "pinned")


def admin_routes(desk: Desk, admin: Callable[..., Caller]) -> APIRouter:
    """The routes under /admin; `admin` says who is asking, or refuses."""
    router = APIRouter(prefix="/admin")
    only = Depends(admin)

    @router.get("/adapters", dependencies=[only])
    def resident() -> Json:
        """What is in memory."""
        return {"adapters": [{key: getattr(one, key) for key in SHOWN} for one in desk.engine.resident()]}

    @router.post("/adapters/load")
    def load(body: AdapterCommand, caller: Caller = only) -> Json:
        loaded = desk.load(body.reference, caller)
        return {"name": loaded.name, "digest": loaded.digest, "nbytes": loaded.nbytes}

    @router.post("/adapters/unload")
    def unload(body: AdapterCommand, caller: Caller = only) -> Json:
        """Requests in work finish first."""
        manifest = desk.resolve(body.reference, caller)
        return {"name": manifest.reference, "unloaded": desk.engine.unload(manifest.reference)}

    @router.post("/aliases", dependencies=[only])
    def alias(body: AliasCommand) -> Json:
        """Requests that were resolved before keep their version."""
        parsed = AdapterReference.parse(f"{body.name}@{body.alias}")
        desk.registry.set_alias(parsed.name, parsed.alias, version=body.version, expect=body.expect)
        return {"reference": str(parsed), "version": body.version}

    @router.get("/splits", dependencies=[only])
    def splits() -> Json:
        """The splits in force, with the share of each."""
        return {"splits": [_split(*item) for item in desk.engine.splits().items()]}

    @router.post("/splits")
    def split(body: SplitCommand, caller: Caller = only) -> Json:
        """Start a split, or end it with a share of 0; running requests keep their version either way."""
        reference = str(AdapterReference.parse(body.reference))
        if body.share == 0:
            return {"reference": reference, "stopped": desk.engine.stop_split(reference)}
        candidate = desk.resolve(body.candidate, caller)
        # Both must be there now: a split for a name that means nothing would only be found out by a client.
        desk.resolve(reference, caller)
        desk.engine.start_split(reference, candidate.reference, share=body.share)
        return _split(reference, (candidate.reference, body.share))

    return router


def _split(reference: str, split: tuple[str, float]) -> Json:
    return {"reference": reference, "candidate": split[0], "share": split[1]}
