"""The two ways in: `add` takes a folder made on this machine, `import` one that came from elsewhere with its manifest.

Both copy the folder aside and examine the copy, so that nothing can change between the look and the keeping; what passes
becomes a version in one step or not at all.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from adapterhub_lite.adapter_format.added_tokens import ADDED_TOKENS_FILE
from adapterhub_lite.adapter_format.folder import ALLOWED_SIZES, Inspection, Survey, survey_folder
from adapterhub_lite.adapter_format.foreign.opening import open_adapter
from adapterhub_lite.adapter_format.lora_config import LoraConfigFile
from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    PROBES_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    BaseRecord,
    EvaluationRecord,
    LoraRecord,
    MergeRecipe,
    OriginRecord,
    ParentRecord,
    TrainingRecord,
    adapter_digest,
    read_manifest,
    read_record,
)
from adapterhub_lite.bases import ResolvedBase, find_base
from adapterhub_lite.bases.chat.template import TEMPLATE_FILE
from adapterhub_lite.bases.fingerprint import is_commit
from adapterhub_lite.bases.fit import check_base, inspect_adapter, take_tokens
from adapterhub_lite.errors import BaseMismatchError, DataError, IntegrityError, UsageError
from adapterhub_lite.registry.operations.sign import incoming_signature, keep_signature, signature_problem
from adapterhub_lite.registry.store.database import stored_digest
from adapterhub_lite.registry.store.store import Store, file_record, stage_file

Json = TypeVar("Json", bound=object)

# An absolute path of at least two parts, POSIX, home-relative or Windows; not the path of a URL.
LOCAL_PATH = re.compile(
    r"(?<![\w:/.\\<])(?:file://)?(?:[A-Za-z]:[\\/]|~[\\/]|/)(?:[^\s/\\'\"<>|,;]{1,255}[\\/]){1,64}([^\s/\\'\"<>|,;]{0,255})"
)


def scrub(value: Json) -> Json:
    """Copy a JSON value with every local path replaced by its last part (`/home/ann/rows.jsonl` -> `rows.jsonl`)."""
    if isinstance(value, str):
        return LOCAL_PATH.sub(lambda match: match[1] or "folder", value)  # type: ignore[return-value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # type: ignore[return-value] # no JSON has a word for it
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]  # type: ignore[return-value]
    return value


logger = logging.getLogger(__name__)

CARRIED_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, PROBES_FILE, TEMPLATE_FILE, ADDED_TOKENS_FILE})


@dataclass(frozen=True)
class Reading:
    """How a source is read: whether pickles are converted, and whether its base may be called otherwise.

    `tell` hears, a sentence each, what was done on the way, dropped or left alone; without it, it is logged.
    """

    convert: bool = False
    base_differs: bool = False
    tell: Callable[[str], None] = logger.warning

    def report(self, found: Inspection) -> None:
        """Say what is worth knowing of an adapter that passes."""
        for note in found.notes:
            self.tell(f"{found.subject}: {note}.")
        if found.left_alone:
            self.tell(f"{found.subject}: left alone: {', '.join(found.left_alone[:20])}.")


@dataclass(frozen=True)
class About:
    """What the caller says of a version in addition to its files."""

    evaluation: Sequence[EvaluationRecord | Mapping[str, Any]] = ()  # a mapping is JSON from outside, validated here
    task: str | None = None
    examples: Sequence[str] = ()
    tags: Sequence[str] = ()
    parents: Sequence[ParentRecord] = ()
    recipe: MergeRecipe | None = None
    answer_schema: Mapping[str, Any] | None = None
    fields: dict[str, Any] = field(init=False)  # keyword arguments of AdapterManifest

    def __post_init__(self) -> None:
        for label in ("examples", "tags"):
            if isinstance(getattr(self, label), str):
                raise UsageError(f"Wanted {label} as a list of texts, got one text.")
        plain = [e.model_dump() if isinstance(e, EvaluationRecord) else dict(e) for e in self.evaluation]
        try:
            measured = tuple(EvaluationRecord.model_validate(scrub(item)) for item in plain)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "evaluation"
            raise UsageError(f"An evaluation wants metric, adapter_value and data: {where}: {first['msg']}.") from error
        fields = {
            "evaluation": measured,
            "task": self.task,
            "examples": tuple(self.examples),
            "tags": tuple(sorted(set(self.tags))),
            "parents": tuple(self.parents),
            "recipe": self.recipe,
            "answer_schema": None if self.answer_schema is None else dict(self.answer_schema),
        }
        object.__setattr__(self, "fields", fields)


def add_adapter(
    store: Store,
    folder: Path,
    name: str,
    *,
    base: ResolvedBase | None,
    about: About,
    verify: Literal["files", "probes"],
    origin: OriginRecord | None = None,
    reading: Reading | None = None,
) -> AdapterManifest:
    """Validate the adapter in `folder` and keep it as the next version of `name`; see `AdapterRegistry.add`."""
    reading = reading or Reading()
    # A registry of a newer schema, or a name that cannot be, is refused before anything is written.
    store.check_new_name(store.read(), name)
    if not folder.exists():
        raise UsageError(f"There is no adapter folder {str(folder)!r}. Give the folder that training saved.")
    with store.staging() as scratch, store.staging() as staging:
        opened = open_adapter(folder, scratch, base=base.folder if base else None, convert=reading.convert)
        if base is not None:
            take_tokens(opened, folder, scratch, base.folder)
        survey = _stage(opened.folder, staging)
        training = _staged_record(staging)
        base = base or (find_base(training.base, store.home) if training else None)
        found = _inspect(staging, survey, base, subject=f"The adapter in {folder.name!r:.100}")
        found.left_alone, found.notes = opened.left_alone + found.left_alone, opened.said + found.notes
        if base is None:
            found.accepted()
            where = store.home / "bases"
            why = f"its base {training.base.id!r} is not in {where}" if training else "it has no training record"
            raise UsageError(f"Which base is {folder.name!r} for? Give base= (command line: --base), for {why}.")
        record = _base_record(found, base, reading.base_differs)
        config, lora = found.accepted()
        reading.report(found)
        if verify == "probes":
            from adapterhub_lite.registry.operations.replay import ensure_probes

            ensure_probes(staging, base, record.quantization)
        (staging / CONFIG_FILE).unlink()
        (staging / CONFIG_FILE).write_bytes(config.to_peft(base_id=record.id, revision=record.revision))
        kept = [name for name in sorted(CARRIED_FILES) if (staging / name).exists()]
        files = {name: store.objects.adopt(staging / name) for name in kept}
        if found.training is not None:
            scrubbed = json.dumps(scrub(found.training.model_dump(mode="json")))
            training = TrainingRecord.model_validate_json(scrubbed)
        with store.write() as connection:
            manifest = AdapterManifest(
                name=name,
                version=store.next_version(connection, name),
                digest=adapter_digest(config.deciding(), files, record.fingerprint, about.answer_schema),
                files=files,
                base=record,
                lora=lora,
                training=training,
                origin=origin,
                created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                **about.fields,
            )
            store.publish(connection, manifest)
    return manifest


def import_adapter(
    store: Store,
    folder: Path,
    *,
    name: str,
    version: int | None = None,
    origin: OriginRecord | None = None,
    expected: AdapterManifest | None = None,
    base: ResolvedBase | None = None,
    verify: Literal["files", "probes"] = "files",
) -> AdapterManifest:
    """Take in a folder that came from elsewhere as the next version of `name`, with its manifest's records and digest.

    Every byte is compared with the manifest and the whole adapter validated before it is visible; with the base on
    this machine (given, or found by the manifest) every tensor is bound to it. An adapter that `name` has already is
    not taken in twice. `version` is the number that a lock gives it, None for the next. `origin` is where it comes
    from; what its manifest calls itself is added to it. `expected` is what it has to be.

    Raises:
        IntegrityError: a file or the digest is not what the manifest says, or there is no manifest.
        AdapterRejectedError: the adapter fails validation.
        BaseMismatchError: `base` is not the one it was made for, or its behaviour there is not the recorded one.
        RegistryError: that version of that name is another adapter here.
        UsageError: the name may not be used here.
        SchemaVersionError: a newer version of this project wrote the manifest.
    """
    with store.guard(f"take in {folder.name!r}"), store.staging() as staging:
        # A registry of a newer schema, or a name that cannot be, is refused before anything is kept.
        store.check_new_name(store.read(), name)
        manifest = _read_promise(folder, expected)
        base = base or find_base(manifest.base, store.home)
        if base is not None and base.fingerprint != manifest.base.fingerprint:
            raise BaseMismatchError(
                f"{manifest.reference} was {manifest.base.difference(base.model_id, base.fingerprint, base.parts)}."
            )
        survey = _stage(folder, staging)
        found = _inspect(staging, survey, base, subject=f"The adapter {manifest.reference}")
        _compare(staging, manifest, found, base)
        signature = incoming_signature(manifest, staging, store.trust)
        if verify == "probes":
            from adapterhub_lite.registry.operations.replay import check_probes

            check_probes(staging, base, manifest.reference, manifest.base.quantization)
        for filename in sorted(manifest.files):
            store.objects.adopt(staging / filename)
        labels = {"name": manifest.name, "version": manifest.version}
        origin = (origin or OriginRecord()).model_copy(update=labels)
        with store.write() as connection:
            here = stored_digest(connection, name, manifest.digest)
            if here is not None and version in (None, here.version):
                if signature is not None and signature_problem(here, signature) is None:
                    keep_signature(store, connection, here, signature)
                return here
            number = version or store.next_version(connection, name)
            local = manifest.model_copy(update={"name": name, "version": number, "origin": origin})
            store.publish(connection, local, signature)
        return local


def _stage(folder: Path, staging: Path) -> Survey:
    """Copy what belongs to the adapter in `folder` into `staging`; returns what was seen of the folder itself."""
    survey = survey_folder(folder)
    for name in survey.usable:
        try:
            stage_file(folder / name, staging / name, limit=ALLOWED_SIZES[name])
        except OSError as error:
            if (staging / name).exists():
                raise
            survey.problems.append(f"{name} cannot be read: {error.strerror}")
    return survey


def _inspect(staging: Path, survey: Survey, base: ResolvedBase | None, *, subject: str) -> Inspection:
    """Examine the copy, and report it together with what was wrong with the folder it was copied from."""
    found = inspect_adapter(staging, base=base, subject=subject)
    # The copy lacks what was refused at first sight: what was said of the folder itself counts.
    repeated = survey_folder(staging).problems
    found.problems = survey.problems + [p for p in found.problems if p not in repeated]
    found.left_alone = survey.left_alone
    return found


def _staged_record(staging: Path) -> TrainingRecord | None:
    try:
        return read_record(staging)
    except DataError:  # the inspection says so
        return None


def _base_record(found: Inspection, base: ResolvedBase, differs: bool) -> BaseRecord:
    named = check_base(found, base, differs=differs)
    recorded = found.training.base if found.training else None
    return BaseRecord(
        id=scrub(base.model_id),
        revision=base.revision,
        fingerprint=base.fingerprint,
        parts=base.parts,
        quantization=recorded.quantization if recorded else None,
        named=scrub(named),
    )


def _read_promise(folder: Path, expected: AdapterManifest | None) -> AdapterManifest:
    path = folder / MANIFEST_FILE
    if not path.is_file() or path.is_symlink():
        raise IntegrityError(f"{folder.name!r} has no {MANIFEST_FILE}: nothing says what its files should be.")
    with path.open("rb") as file:
        # Where it says that it came from is not its own to say, least of all to the check of its signature.
        manifest = read_manifest(file.read(ALLOWED_SIZES[MANIFEST_FILE] + 1)).model_copy(update={"origin": None})
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


def _compare(staging: Path, manifest: AdapterManifest, found: Inspection, base: ResolvedBase | None) -> None:
    """Raise unless the staged files are what the manifest says, and the adapter in them is sound.

    Bytes first: what is damaged on the way should be called that, not an invalid adapter.
    """
    for name, promised in manifest.files.items():
        if not (staging / name).is_file():
            continue
        record = file_record(staging / name)
        if record != promised:
            raise IntegrityError(
                f"{name} of {manifest.reference} is damaged: wanted {promised.size} bytes with sha256 "
                f"{promised.sha256:.16}..., got {record.size} with {record.sha256:.16}... Fetch it again."
            )
    config, lora = found.accepted()
    missing = set(manifest.files) - set(found.usable)
    if missing:
        raise IntegrityError(f"{sorted(missing)} of {manifest.reference} did not come with it. Fetch it again.")
    _compare_lora(manifest, config, lora, counted=base is not None)


def _compare_lora(manifest: AdapterManifest, config: LoraConfigFile, lora: LoraRecord, *, counted: bool) -> None:
    digest = adapter_digest(config.deciding(), manifest.files, manifest.base.fingerprint, manifest.answer_schema)
    if digest != manifest.digest:
        raise IntegrityError(f"The manifest of {manifest.reference} claims {manifest.digest}, its files make {digest}.")
    claimed = manifest.lora
    if not counted:
        # Without the base nobody can count its modules; everything else must be as the files say.
        lora = lora.model_copy(update={"modules_bound": claimed.modules_bound, "modules_total": claimed.modules_total})
    if lora != claimed:
        raise IntegrityError(f"The manifest of {manifest.reference} describes another LoRA than its files hold.")
