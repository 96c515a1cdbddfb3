"""The door between the local store and anywhere else: what is published of a version, and a verified way in."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    PROBES_FILE,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    read_manifest,
)
from adapterhub_lite.adapter_format.reference import is_name
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import BaseMismatchError, IntegrityError, UsageError
from adapterhub_lite.registry.check.survey import ALLOWED_SIZES
from adapterhub_lite.registry.operations.intake import (
    adapter_digest,
    find_base,
    is_commit,
    keep_objects,
    manifest_path,
    publish,
    stage_adapter,
)
from adapterhub_lite.registry.store.objects import file_record
from adapterhub_lite.registry.store.rows import parse_stored

if TYPE_CHECKING:
    from adapterhub_lite.registry.registry import AdapterRegistry

CARRIED_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, PROBES_FILE})


def adapter_files(registry: "AdapterRegistry", manifest: AdapterManifest) -> dict[str, Path]:
    """What is published of a version: file name -> immutable local file, each compared with the manifest.

    `adapterhub.json` is among them, `adapterhub.sig.json` when the version is signed; the card is not.

    Raises:
        IntegrityError: a file is missing or damaged here; published, it could never be taken back.
    """
    published = {name: registry.file(manifest, name, verify=True) for name in manifest.files}
    own = manifest_path(registry.home, manifest.name, manifest.version)
    published[MANIFEST_FILE] = own
    if own.with_suffix(".sig").exists():
        published[SIGNATURE_FILE] = own.with_suffix(".sig")
    return published


def import_adapter(
    registry: "AdapterRegistry",
    folder: Path,
    *,
    name: str | None = None,
    expected: AdapterManifest | None = None,
    base: ResolvedBase | None = None,
    verify: Literal["files", "probes"] = "files",
) -> AdapterManifest:
    """Take in a folder that came from elsewhere, keeping its manifest (version number, records, digest).

    Every byte is compared with the manifest and the whole adapter validated before it is visible; with the base on
    this machine (given, or found by the manifest) every tensor is bound to it. Taking in the same version again
    changes nothing. `expected` is what a lock promised; the folder's own manifest has to agree with it.

    Raises:
        IntegrityError: a file or the digest is not what the manifest says, or there is no manifest.
        AdapterRejectedError: the adapter fails validation.
        BaseMismatchError: `base` is not the one it was made for, or its behaviour there is not the recorded one.
        RegistryError: that version of that name is another adapter here.
        SchemaVersionError: a newer version of this project wrote the manifest.
    """
    with registry.guard(f"take in {folder.name!r}"), registry.objects.staging() as staging:
        registry.database.read()  # a registry of a newer schema is refused before anything is kept
        manifest = _read_promise(folder, expected)
        if name is not None and not is_name(name):
            raise UsageError(f"Wanted a name of 1 to 64 letters, digits, '.', '_', '-'; got {name!r:.80}.")
        base = base or find_base(manifest.base, registry.home)
        if base is not None and base.fingerprint != manifest.base.fingerprint:
            raise BaseMismatchError(
                f"{manifest.reference} was {manifest.base.difference(base.model_id, base.fingerprint, base.parts)}."
            )
        _examine(folder, staging, manifest, base)
        signature = registry.trust.check(manifest, staging)
        if verify == "probes":
            from adapterhub_lite.registry.check.replay import check_probes

            check_probes(staging, base, manifest.reference, manifest.base.quantization)
        local = manifest.model_copy(update={"name": name or manifest.name})
        keep_objects(registry.objects, staging, list(manifest.files))
        return _keep(registry, local, signature)


def _read_promise(folder: Path, expected: AdapterManifest | None) -> AdapterManifest:
    path = folder / MANIFEST_FILE
    if not path.is_file() or path.is_symlink():
        raise IntegrityError(f"{folder.name!r} has no {MANIFEST_FILE}: nothing says what its files should be.")
    with path.open("rb") as file:
        manifest = read_manifest(file.read(ALLOWED_SIZES[MANIFEST_FILE] + 1))
    if expected is not None and (expected.digest, expected.files) != (manifest.digest, manifest.files):
        raise IntegrityError(
            f"{manifest.reference} is not the adapter expected: wanted {expected.digest}, its manifest says "
            f"{manifest.digest}" + ("." if expected.digest != manifest.digest else " with other files.")
        )
    if not is_commit(manifest.base.revision):
        raise IntegrityError(
            f"The base in the manifest of {manifest.reference} is at {manifest.base.revision!r:.80}, "
            "which is not a 40-hex commit."
        )
    if not {CONFIG_FILE, WEIGHTS_FILE} <= set(manifest.files) <= CARRIED_FILES:
        raise IntegrityError(f"The manifest of {manifest.reference} lists other files than {sorted(CARRIED_FILES)}.")
    return manifest


def _examine(folder: Path, staging: Path, manifest: AdapterManifest, base: ResolvedBase | None) -> None:
    """Bytes first: what is damaged on the way should be called that, not an invalid adapter."""
    staged = stage_adapter(folder, staging, base=base, subject=f"The adapter {manifest.reference}")
    for name, promised in manifest.files.items():
        if not (staging / name).is_file():
            continue
        found = file_record(staging / name)
        if found != promised:
            raise IntegrityError(
                f"{name} of {manifest.reference} is damaged: wanted {promised.size} bytes with sha256 "
                f"{promised.sha256:.16}..., got {found.size} with {found.sha256:.16}... Fetch it again."
            )
    config, lora = staged.inspection.accepted()
    missing = set(manifest.files) - set(staged.inspection.usable)
    if missing:
        raise IntegrityError(f"{sorted(missing)} of {manifest.reference} did not come with it. Fetch it again.")
    digest = adapter_digest(config, manifest.files[WEIGHTS_FILE].sha256, manifest.base.fingerprint)
    if digest != manifest.digest:
        raise IntegrityError(f"The manifest of {manifest.reference} claims {manifest.digest}, its files make {digest}.")
    claimed = manifest.lora
    if base is None:
        # Without the base nobody can count its modules; everything else must be as the files say.
        lora = lora.model_copy(update={"modules_bound": claimed.modules_bound, "modules_total": claimed.modules_total})
    if lora != claimed:
        raise IntegrityError(f"The manifest of {manifest.reference} describes another LoRA than its files hold.")


def _keep(registry: "AdapterRegistry", manifest: AdapterManifest, signature: bytes | None) -> AdapterManifest:
    key = (manifest.name, manifest.version)
    with registry.database.write() as connection:
        row = connection.execute("SELECT manifest FROM versions WHERE name = ? AND version = ?", key).fetchone()
        if row and parse_stored(row[0]).digest == manifest.digest:
            return parse_stored(row[0])
        publish(connection, registry.home, manifest, signature)
    return manifest
