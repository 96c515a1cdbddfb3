"""What only the admin's key may do: load and unload adapters, move aliases, start and end splits.

By reference (`name@version` and the like) only, never by path or URL.
"""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends

from adapterhub_lite.adapter_format.manifest import AdapterReference
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.dispatch import Dispatcher
from adapterhub_lite.serving.api.wire.requests import AdapterCommand, AliasCommand, SplitCommand

Json = dict[str, Any]
SHOWN = ("name", "digest", "rank", "modules", "nbytes", "uses", "pinned", "apart")


def admin_routes(dispatcher: Dispatcher, admin: Callable[..., Caller]) -> APIRouter:
    """The routes under /admin; `admin` gives the caller, or refuses everybody else."""
    router, engine = APIRouter(prefix="/admin"), dispatcher.engine
    only_admin = Depends(admin)

    @router.get("/adapters", dependencies=[only_admin])
    def resident() -> Json:
        """List the adapters in memory."""
        return {"adapters": [{key: getattr(one, key) for key in SHOWN} for one in engine.resident()]}

    @router.post("/adapters/load")
    def load(body: AdapterCommand, caller: Caller = only_admin) -> Json:
        """Load an adapter into memory before anybody asks it."""
        loaded = dispatcher.load(body.reference, caller)
        return {"name": loaded.name, "digest": loaded.digest, "nbytes": loaded.nbytes}

    @router.post("/adapters/unload")
    def unload(body: AdapterCommand, caller: Caller = only_admin) -> Json:
        """Take an adapter out of memory; requests in work finish first."""
        manifest = dispatcher.manifest(body.reference, caller)
        return {"name": manifest.reference, "unloaded": engine.unload(manifest.reference)}

    @router.post("/aliases", dependencies=[only_admin])
    def alias(body: AliasCommand) -> Json:
        """Move an alias; requests that were resolved before keep their version."""
        parsed = AdapterReference.parse(f"{body.name}@{body.alias}")
        assert parsed.name is not None and parsed.alias is not None, "name@alias was parsed"
        dispatcher.store.set_alias(parsed.name, parsed.alias, version=body.version, expect=body.expect)
        return {"reference": str(parsed), "version": body.version}

    @router.get("/splits", dependencies=[only_admin])
    def splits() -> Json:
        """List the splits in force, each with its share."""
        return {"splits": [_split(*item) for item in engine.splits().items()]}

    @router.post("/splits")
    def split(body: SplitCommand, caller: Caller = only_admin) -> Json:
        """Start a split, or end it with a share of 0; running requests keep their version either way."""
        reference = str(AdapterReference.parse(body.reference))
        if body.share == 0:
            return {"reference": reference, "stopped": engine.stop_split(reference)}
        candidate = dispatcher.manifest(body.candidate, caller)
        # Both must exist now: a split of an unknown name would only be noticed by a client's request.
        asked = dispatcher.manifest(reference, caller)
        if candidate.name != asked.name:
            # Keys open adapters by name: one that opens the first would be answered by the second.
            raise ConfigurationError(
                f"A split is between versions of one adapter; {candidate.reference} is none of {asked.name!r}. Add it as a "
                f"version of {asked.name!r}, or let clients ask for it."
            )
        engine.start_split(reference, candidate.reference, share=body.share)
        return _split(reference, (candidate.reference, body.share))

    return router


def _split(reference: str, split: tuple[str, float]) -> Json:
    return {"reference": reference, "candidate": split[0], "share": split[1]}
