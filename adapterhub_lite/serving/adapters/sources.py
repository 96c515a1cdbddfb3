"""Where adapters come from: the registry, or a plain PEFT folder. Says which file to read and how it is scaled.

The seam between the engine and the store: the engine never sees a manifest or a folder. A string is a reference and
only a `Path` is a folder, so that no text of a client ever becomes a path.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.adapter_format.probes import PROBES_FILE
from adapterhub_lite.errors import AdapterRejectedError, UnknownNameError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk. `digest` names its bytes; `scaling_of` gives the scale of a module path.

    `sha256` is what the bytes of `weights` must have. `base_fingerprint` is None where nobody recorded it, `probes`
    where the folder has none. `hold` keeps the store from
    removing the files until what it gives is left or forgotten.
    """

    name: str
    digest: str
    weights: Path
    scaling_of: Callable[[str], float]
    base_fingerprint: str | None = None
    hold: Callable[[], AbstractContextManager[Any]] = nullcontext
    probes: Path | None = None
    sha256: str | None = None


class PullReceipt(Protocol):
    """What a pull brought."""

    @property
    def manifest(self) -> AdapterManifest:
        """The version as the registry now holds it."""
        ...


class AdapterStore(Protocol):
    """What serving needs of a registry; `AdapterRegistry` is one."""

    def resolve(self, reference: str, /) -> AdapterManifest:
        """The version that a reference names now."""
        ...

    def list(self) -> Sequence[AdapterManifest]:
        """Every version, by name and version."""
        ...

    def aliases(self, name: str, /) -> Mapping[str, int]:
        """The aliases of a name and the versions they point at."""
        ...

    def set_alias(self, name: str, alias: str, /, *, version: int, expect: int | None = None) -> None:
        """Point an alias at a version; with `expect` only if it points there now (0: only if there is none)."""
        ...

    def file(self, manifest: AdapterManifest, filename: str, /) -> Path:
        """The immutable local file of a version."""
        ...

    def hold(self, manifest: AdapterManifest, /) -> AbstractContextManager[object]:
        """Keep a version from being collected while it is in use."""
        ...

    def pull(
        self, repo_id: str, *, revision: str | None = None, endpoint: str | None = None, offline: bool = False
    ) -> PullReceipt:
        """Take in a version from a hub; `offline` asks only what an earlier pull left here."""
        ...


class AdapterSource(Protocol):
    """Anything that turns a reference into files."""

    def locate(self, reference: str | Path) -> AdapterFiles:
        """Return what `reference` points to at this moment; a `Path` is a folder."""
        ...


class FolderSource:
    """Adapters are given as the `Path` of a plain PEFT folder; no name means anything here."""

    def __init__(self) -> None:
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}

    def locate(self, reference: str | Path) -> AdapterFiles:
        """Return the folder's files; its digest is over configuration and weights.

        Raises:
            UnknownNameError: there is no such folder, or a name was given.
            AdapterRejectedError: it is no plain LoRA adapter.
        """
        if isinstance(reference, str):
            raise UnknownNameError(
                f"There is no adapter {reference!r}: this engine has no registry to look a name up in. Start it with "
                "one, or give a folder as pathlib.Path."
            )
        folder, shown = reference, str(reference)
        weights = folder / WEIGHTS_FILE
        try:
            config_bytes = (folder / CONFIG_FILE).read_bytes()
            weights_digest = self._digest(weights)
        except OSError as error:
            raise UnknownNameError(
                f"There is no adapter {shown!r}: wanted a folder with {CONFIG_FILE} and {WEIGHTS_FILE}. "
                "Give such a folder, or start the engine with a registry that knows the name."
            ) from error
        try:
            config = json.loads(config_bytes)
        except ValueError as error:
            raise AdapterRejectedError(shown, [f"{CONFIG_FILE} is not JSON: {error}"]) from error
        problems = config_problems(config)
        if problems:
            raise AdapterRejectedError(shown, problems)
        digest = hashlib.sha256(config_bytes + weights_digest.encode()).hexdigest()
        probes = folder / PROBES_FILE
        return AdapterFiles(
            folder.name,
            f"sha256:{digest}",
            weights,
            lambda module: config_scaling(config, module),
            probes=probes if probes.is_file() else None,
            sha256=weights_digest,
        )

    def _digest(self, path: Path) -> str:
        """Return the sha256 of a file, read again only when its size or time of change is another."""
        stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        known = self._digests.get(path)
        if known is None or known[0] != stamp:
            with path.open("rb") as file:
                known = (stamp, hashlib.file_digest(file, "sha256").hexdigest())
            self._digests[path] = known
        return known[1]


class RegistrySource:
    """References are the registry's; a `Path` is a folder."""

    def __init__(self, registry: AdapterStore) -> None:
        self._registry = registry
        self._folders = FolderSource()

    def locate(self, reference: str | Path) -> AdapterFiles:
        """Return the files of the version that `reference` names now."""
        if isinstance(reference, Path):
            return self._folders.locate(reference)
        manifest = self._registry.resolve(reference)
        name: str = manifest.reference
        if not manifest.lora.is_plain:
            raise AdapterRejectedError(
                name, ["it uses DoRA or a LoRA bias, which cannot share a batch; merge it first"]
            )
        return AdapterFiles(
            name,
            manifest.digest,
            self._registry.file(manifest, WEIGHTS_FILE),
            manifest.lora.scaling_of,
            manifest.base.fingerprint,
            lambda: self._registry.hold(manifest),
            self._registry.file(manifest, PROBES_FILE) if PROBES_FILE in manifest.files else None,
            manifest.files[WEIGHTS_FILE].sha256,
        )


def config_problems(config: Any) -> list[str]:
    """Say why an adapter_config.json is not that of a plain LoRA on linear layers; empty when it is."""
    if not isinstance(config, dict):
        return [f"{CONFIG_FILE} is not an object"]
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"its type is {config.get('peft_type')!r}, only LORA can be served")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        problems.append("r or lora_alpha is missing")
    for key in (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "fan_in_fan_out",
        "target_parameters",
        "trainable_token_indices",
    ):
        if config.get(key):
            problems.append(f"it uses {key}, which cannot share a batch; merge it first")
    if config.get("bias", "none") != "none":
        problems.append("it trains biases, which cannot share a batch; merge it first")
    return problems


def config_scaling(config: Mapping[str, Any], module: str) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA, of one module, patterns included."""

    def pattern(key: str, default: Any) -> Any:
        found = config.get(key) or {}
        return next((v for k, v in found.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    rank = pattern("rank_pattern", config["r"])
    alpha = pattern("alpha_pattern", config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
