"""A plugin for those who run vLLM by themselves: it finds adapters in the registry by the name that a request gives.

Entry point `adapterhub` of the group `vllm.general_plugins`. Names are those that always mean the same bytes: `sql:3`,
`sha256:...`, `org/repo:3`. vLLM keeps what a name was resolved to for ever, so a name that may move is refused, with the
reason. Installed beside vLLM with `--no-deps`, it uses the packages that vLLM brings.

Environment: `ADAPTERHUB_HOME` (the registry), `ADAPTERHUB_PULL` (hub repositories that may be pulled, such as `org/*`,
comma-separated; none without it).
"""

import asyncio
import atexit
import os
import threading
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.manifest import AdapterReference
from adapterhub_lite.bases.fingerprint import base_fingerprint
from adapterhub_lite.errors import AdapterHubError, ReferenceSyntaxError, UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.adapters.hub_source import REFERENCE, HubSource
from adapterhub_lite.serving.adapters.sources import AdapterFiles
from adapterhub_lite.serving.adapters.split import WeightedReference
from adapterhub_lite.serving.vllm.adapter_files import Shelf, write_adapter

NAME = "adapterhub"


class RegistryResolver:
    """vLLM's `LoRAResolver` over a registry. `pull` are the hub repositories that may be pulled, as patterns."""

    def __init__(self, home: str | Path | None = None, pull: tuple[str, ...] = ()) -> None:
        registry = AdapterRegistry(adapterhub_home(home))
        self._registry, self._source = registry, HubSource(registry, pull)
        self._shelf: Shelf | None = None
        self._lock = threading.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """A `LoRARequest` for `lora_name` on the base, or None where the registry has no such adapter.

        Raises:
            ValueError: it is there and cannot be served so: a name that may move, another base, a kind of LoRA that vLLM
                has not, damaged bytes, a package that is missing. vLLM answers 400 with the text.
        """
        try:
            folder = await asyncio.to_thread(self.folder, base_model_name, lora_name)
        except AdapterHubError as error:
            raise ValueError(str(error)) from error
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{lora_name!r} cannot be looked up: the package {error.name!r} is not installed beside vLLM."
            ) from error
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        # vLLM numbers it itself.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))

    def folder(self, base_model_name: str, lora_name: str) -> Path | None:
        """The folder that vLLM loads for a name; None where the registry has no such adapter.

        Raises:
            ValueError, AdapterHubError: as `resolve_lora` says.
        """
        files = self._located(lora_name)
        if files is None:
            return None
        served = Path(base_model_name)
        if served.is_dir() and files.base_fingerprint is not None:
            here = base_fingerprint(served)
            if here != files.base_fingerprint:
                raise ValueError(
                    f"{files.name} was made for a base with the fingerprint {files.base_fingerprint[:16]}, this vLLM serves one "
                    f"with {here[:16]}."
                )
        elif not served.is_dir():
            known = self._registry.resolve(files.digest).base
            if base_model_name not in (known.id, known.named):
                raise ValueError(f"{files.name} was made for the base {known.id}, this vLLM serves {base_model_name}.")
        with self._lock:
            if self._shelf is None:
                self._shelf = Shelf()
                atexit.register(self._shelf.close)
        found = FoundAdapters((files,), (WeightedReference(files.digest),))
        folder, _ = self._shelf.put(files.digest, NAME, lambda place: write_adapter(found, place, max_rank=None))
        return folder

    def _located(self, lora_name: str) -> AdapterFiles | None:
        remote = REFERENCE.fullmatch(lora_name)
        try:
            if remote is None:
                parsed = AdapterReference.parse(lora_name)
                moves = parsed.digest is None and parsed.version is None
            else:
                moves = remote["version"] is None
            if not moves:
                return self._source.locate(lora_name)
            if remote is None:
                known = self._registry.resolve(lora_name)
                exact = f"{known.reference} or {known.digest}"
            else:
                exact = f"{remote['repo']}:3"
        except (UnknownNameError, ReferenceSyntaxError):
            return None
        raise ValueError(
            f"{lora_name!r} may mean other bytes tomorrow, and vLLM would go on with those of today. Ask for what never moves: "
            f"{exact}."
        )


def register() -> None:
    """What vLLM calls in each of its processes when it starts."""
    from vllm.lora.resolver import LoRAResolverRegistry

    pull = tuple(part.strip() for part in os.environ.get("ADAPTERHUB_PULL", "").split(",") if part.strip())
    LoRAResolverRegistry.register_resolver(NAME, RegistryResolver(pull=pull))
