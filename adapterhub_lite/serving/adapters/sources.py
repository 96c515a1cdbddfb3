"""Where adapters come from: the registry, or a plain PEFT folder. Says which file to read and how it is scaled.

The seam between the engine and the store: the engine never sees a manifest or a folder. A string is a reference and
only a `Path` is a folder, so that no text of a client ever becomes a path.
"""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapterhub_lite.adapter_format.added_tokens import ADDED_TOKENS_FILE, AddedTokens, read_added_tokens
from adapterhub_lite.adapter_format.foreign.opening import ARCHIVED_SIZES, open_adapter
from adapterhub_lite.adapter_format.lora_config import LoraConfigFile, read_lora_config
from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    TextRecord,
    TrainingRecord,
)
from adapterhub_lite.adapter_format.probes import PROBES_FILE
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.chat.template import TEMPLATE_FILE, digest_of
from adapterhub_lite.bases.fit import check_base, inspect_adapter, take_tokens
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError, UnknownNameError
from adapterhub_lite.files import settled_stamps
from adapterhub_lite.registry.store.store import file_record


@dataclass(frozen=True)
class AskedAs:
    """How an adapter learned to be asked and to end. None is as the base; `template` and `added` tokens it brings along.

    `prefill` is what the template writes when it asks and that the adapter's answers never began with. Answers are JSON
    after `answer_schema` where a request asks for nothing else.
    """

    end_tokens: frozenset[int] | None = None
    template_digest: str | None = None
    template: str | None = None
    prefill: str = ""
    answer_schema: Mapping[str, Any] | None = None
    added: AddedTokens | None = None


def asked_as(
    subject: str,
    record: TrainingRecord | None,
    template: Path | None,
    schema: Mapping[str, Any] | None = None,
    tokens: Path | None = None,
) -> AskedAs:
    """What an adapter's record, its template file and the file of its tokens say.

    Raises:
        AdapterRejectedError: the template is not the one that the record names, or the tokens cannot be read.
    """
    text = None
    if template is not None:
        text = template.read_bytes().decode("utf-8", "replace")
    digest = record.template_digest if record is not None else None
    if text is not None and digest is not None and digest_of(text) != digest:
        raise AdapterRejectedError(subject, [f"its {TEMPLATE_FILE} is not the one that its training record names"])
    if text is not None:
        digest = digest_of(text)
    told = record.text if record is not None and record.text is not None else TextRecord()
    try:
        added = None if tokens is None else read_added_tokens(tokens.read_bytes())
    except ValueError as error:
        raise AdapterRejectedError(subject, [str(error)]) from error
    return AskedAs(frozenset(told.end_tokens) or None, digest, text, told.prefill, schema, added)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk. `digest` names its bytes; `scaling_of` gives the scale of a module path.

    `sha256` is what the bytes of `weights` must have. `base_fingerprint` is None where nobody recorded it, `probes`
    where the folder has none. `hold` keeps the store from
    removing the files until what it gives is left or forgotten. `config` reads what it changes, and in which way.
    """

    name: str
    digest: str
    weights: Path
    scaling_of: Callable[[str], float]
    base_fingerprint: str | None = None
    hold: Callable[[], AbstractContextManager[Any]] = nullcontext
    probes: Path | None = None
    sha256: str | None = None
    asked: AskedAs = AskedAs()
    config: Callable[[], LoraConfigFile] | None = None


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
    """Adapters are given as the `Path` of a PEFT folder; no name means anything here.

    A folder passes the very check of the registry's `add`, once for each state of its files. `base` None: shapes are
    checked without the base.
    """

    def __init__(self, base: ResolvedBase | None = None) -> None:
        self._base = base
        self._known: dict[Path, tuple[object, AdapterFiles]] = {}

    def locate(self, reference: str | Path) -> AdapterFiles:
        """Return the folder's files; its digest is over configuration and weights.

        Raises:
            UnknownNameError: there is no such folder, or a name was given.
            AdapterRejectedError: it fails the check, or is no plain LoRA; with every reason.
            BaseMismatchError: its training record names another base.
        """
        if isinstance(reference, str):
            raise UnknownNameError(
                f"There is no adapter {reference!r}: this engine has no registry to look a name up in. Start it with "
                "one, or give a folder as pathlib.Path."
            )
        try:
            stamp = _stamp(reference)
        except OSError as error:
            raise UnknownNameError(
                f"There is no adapter {str(reference)!r}: wanted a folder with {CONFIG_FILE} and {WEIGHTS_FILE}. "
                "Give such a folder, or start the engine with a registry that knows the name."
            ) from error
        if stamp is None:
            return self._examine(reference)
        known = self._known.get(reference)
        if known is None or known[0] != stamp:
            known = self._known[reference] = (stamp, self._examine(reference))
        return known[1]

    def _examine(self, source: Path) -> AdapterFiles:
        # What is not plain PEFT is converted into a folder that lives as long as somebody may read from it.
        scratch = Path(tempfile.mkdtemp(prefix="adapterhub-adapter-"))
        try:
            files = self._check(source, scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        weakref.finalize(files, shutil.rmtree, scratch, ignore_errors=True)
        return files

    def _check(self, source: Path, scratch: Path) -> AdapterFiles:
        opened = open_adapter(source, scratch, base=self._base.folder if self._base else None)
        if self._base is not None:
            take_tokens(opened, source, scratch, self._base.folder)
        folder = opened.folder
        found = inspect_adapter(folder, base=self._base, subject=str(source))
        if self._base is not None:
            check_base(found, self._base)
        config, lora = found.accepted()
        weights, probes, template = (folder / name for name in (WEIGHTS_FILE, PROBES_FILE, TEMPLATE_FILE))
        weights_digest = file_record(weights).sha256
        tokens = folder / ADDED_TOKENS_FILE if ADDED_TOKENS_FILE in found.usable else None
        asked = asked_as(
            str(folder), found.training, template if TEMPLATE_FILE in found.usable else None, tokens=tokens
        )
        digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes() + weights_digest.encode())
        digest.update((asked.template or "").encode() + (tokens.read_bytes() if tokens else b""))
        return AdapterFiles(
            source.name,
            f"sha256:{digest.hexdigest()}",
            weights,
            lora.scaling_of,
            found.training.base.fingerprint if found.training else None,
            probes=probes if PROBES_FILE in found.usable else None,
            sha256=weights_digest,
            asked=asked,
            config=lambda: config,
        )


def _stamp(source: Path) -> object:
    """What changes whenever an adapter does: the stamps of the folder and of what may belong to it; None: nothing yet."""
    names = sorted(name for name in ARCHIVED_SIZES if (source / name).is_file()) if source.is_dir() else []
    stamps = settled_stamps([source, *(source / name for name in names)])
    return None if stamps is None else (names, stamps)


class RegistrySource:
    """References are the registry's; a `Path` is a folder."""

    def __init__(self, registry: AdapterStore, base: ResolvedBase | None = None) -> None:
        self._registry = registry
        self._folders = FolderSource(base)

    def locate(self, reference: str | Path) -> AdapterFiles:
        """Return the files of the version that `reference` names now."""
        if isinstance(reference, Path):
            return self._folders.locate(reference)
        manifest = self._registry.resolve(reference)
        name: str = manifest.reference
        return AdapterFiles(
            name,
            manifest.digest,
            self._registry.file(manifest, WEIGHTS_FILE),
            manifest.lora.scaling_of,
            manifest.base.fingerprint,
            lambda: self._registry.hold(manifest),
            self._registry.file(manifest, PROBES_FILE) if PROBES_FILE in manifest.files else None,
            manifest.files[WEIGHTS_FILE].sha256,
            asked_as(
                name,
                manifest.training,
                self._registry.file(manifest, TEMPLATE_FILE) if TEMPLATE_FILE in manifest.files else None,
                manifest.answer_schema,
                self._registry.file(manifest, ADDED_TOKENS_FILE) if ADDED_TOKENS_FILE in manifest.files else None,
            ),
            lambda: self._config(manifest),
        )

    def _config(self, manifest: AdapterManifest) -> LoraConfigFile:
        content = self._registry.file(manifest, CONFIG_FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.files[CONFIG_FILE].sha256:
            raise IntegrityError(
                f"The configuration of {manifest.reference} is not the recorded bytes any more. `adapterhub-lite doctor` says "
                "what else is damaged."
            )
        return read_lora_config(content)
