"""`add`: an adapter folder made on this machine becomes the next version of a name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    PROBES_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    EvaluationRecord,
    MergeRecipe,
    ParentRecord,
)
from adapterhub_lite.adapter_format.record import BaseRecord, TrainingRecord
from adapterhub_lite.adapter_format.reference import is_name
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterRejectedError, BaseMismatchError, UsageError
from adapterhub_lite.registry.check.folder import inspect_adapter
from adapterhub_lite.registry.check.redaction import scrub
from adapterhub_lite.registry.operations.aliases import utc_now
from adapterhub_lite.registry.operations.intake import (
    StagedAdapter,
    adapter_digest,
    find_base,
    is_commit,
    keep_objects,
    next_version,
    publish,
    stage_adapter,
)

if TYPE_CHECKING:
    from adapterhub_lite.registry.registry import AdapterRegistry


@dataclass(frozen=True)
class About:
    """What the caller says of a version beside its files."""

    evaluation: Sequence[EvaluationRecord | Mapping[str, Any]] = ()
    task: str | None = None
    examples: Sequence[str] = ()
    tags: Sequence[str] = ()
    parents: Sequence[ParentRecord] = ()
    recipe: MergeRecipe | None = None
    fields: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        for label in ("examples", "tags"):
            if isinstance(getattr(self, label), str):
                raise UsageError(f"Wanted {label} as a list of texts, got one text.")
        try:
            measured = tuple(EvaluationRecord.model_validate(scrub(_plain(item))) for item in self.evaluation)
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
        }
        object.__setattr__(self, "fields", fields)


def add_adapter(
    registry: "AdapterRegistry",
    folder: Path,
    name: str,
    *,
    base: ResolvedBase | None,
    about: About,
    verify: Literal["files", "probes"],
) -> AdapterManifest:
    """Validate the adapter in `folder` and keep it as the next version of `name`; see `AdapterRegistry.add`."""
    if not is_name(name):
        raise UsageError(f"Wanted a name of 1 to 64 letters, digits, '.', '_', '-'; got {name!r:.80}.")
    if not folder.is_dir():
        raise UsageError(f"There is no adapter folder {str(folder)!r}. Give the folder that training saved.")
    registry.database.read()  # a registry of a newer schema is refused before anything is written
    with registry.objects.staging() as staging:
        base = base or _recorded_base(folder, registry.home)
        staged = stage_adapter(folder, staging, base=base)
        record = _base_record(staged, base)
        config, lora = staged.inspection.accepted()
        if verify == "probes":
            from adapterhub_lite.registry.check.replay import ensure_probes

            ensure_probes(staging, base)
        (staging / CONFIG_FILE).unlink()
        (staging / CONFIG_FILE).write_bytes(config.to_peft(base_id=record.id, revision=record.revision))
        kept = [name for name in (CONFIG_FILE, WEIGHTS_FILE, PROBES_FILE) if (staging / name).exists()]
        files = keep_objects(registry.objects, staging, kept)
        training = staged.inspection.training
        with registry.database.write() as connection:
            manifest = AdapterManifest(
                name=name,
                version=next_version(connection, name),
                digest=adapter_digest(config, files[WEIGHTS_FILE].sha256, record.fingerprint),
                files=files,
                base=record,
                lora=lora,
                training=_scrubbed(training) if training else None,
                created=utc_now(),
                **about.fields,
            )
            publish(connection, registry.home, manifest)
    return manifest


def _recorded_base(folder: Path, home: Path) -> ResolvedBase:
    """The base that the folder's training record names."""
    inspection = inspect_adapter(folder)
    training = inspection.training
    found = find_base(training.base, home) if training else None
    if found is not None:
        return found
    if inspection.problems:
        raise AdapterRejectedError(inspection.subject, inspection.problems)
    why = f"its base {training.base.id!r} is not in {home / 'bases'}" if training else "it has no training record"
    raise UsageError(f"Which base is {folder.name!r} for? Give base= (command line: --base), for {why}.")


def _base_record(staged: StagedAdapter, base: ResolvedBase) -> BaseRecord:
    training, problems = staged.inspection.training, staged.inspection.problems
    recorded = training.base if training else None
    for revision in {base.revision, recorded.revision if recorded else None}:
        if not is_commit(revision):
            problems.append(f"the base's revision {revision!r:.80} is not a 40-hex commit")
    if recorded is not None and recorded.fingerprint != base.fingerprint:
        text = f"it was {recorded.difference(base.model_id, base.fingerprint, base.parts)}"
        if not problems:
            raise BaseMismatchError(f"{staged.inspection.subject} is for another base: {text}.")
        problems.append(text)
    return BaseRecord(
        id=scrub(base.model_id),
        revision=base.revision,
        fingerprint=base.fingerprint,
        parts=base.parts,
        quantization=recorded.quantization if recorded else None,
    )


def _scrubbed(training: TrainingRecord) -> TrainingRecord:
    return TrainingRecord.model_validate_json(json.dumps(scrub(training.model_dump(mode="json"))))


def _plain(item: EvaluationRecord | Mapping[str, Any]) -> dict[str, Any]:
    return item.model_dump() if isinstance(item, EvaluationRecord) else dict(item)
