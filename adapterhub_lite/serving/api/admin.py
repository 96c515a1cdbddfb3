"""What only the admin's key may do: load and unload adapters, move aliases, start and end canaries.

By reference (`name@version` and the like) only; a path or a URL is none.
"""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends

from adapterhub_lite.adapter_format.reference import AdapterReference
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.dispatch import Desk
from adapterhub_lite.serving.api.schema import AdapterCommand, AliasCommand, CanaryCommand

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

    @router.get("/canaries", dependencies=[only])
    def canaries() -> Json:
        """The canaries in force, with the share of each."""
        return {"canaries": [_canary(*item) for item in desk.engine.canaries().items()]}

    @router.post("/canaries")
    def canary(body: CanaryCommand, caller: Caller = only) -> Json:
        """Start a canary, or end it with a share of 0; running requests keep their version either way."""
        reference = str(AdapterReference.parse(body.reference))
        if body.share == 0:
            return {"reference": reference, "stopped": desk.engine.stop_canary(reference)}
        candidate = desk.resolve(body.candidate, caller)
        # Both must be there now: a canary for a name that means nothing would only be found out by a client.
        desk.resolve(reference, caller)
        desk.engine.start_canary(reference, candidate.reference, canary=body.share)
        return _canary(reference, (candidate.reference, body.share))

    return router


def _canary(reference: str, split: tuple[str, float]) -> Json:
    return {"reference": reference, "candidate": split[0], "share": split[1]}
