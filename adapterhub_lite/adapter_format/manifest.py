"""What one adapter version is and how it is named: references, the training record, and the manifest.

The training record says what a run was; training writes it beside its adapter, the registry keeps it. The manifest is
the strict JSON of `adapterhub.json`. References are `sql`, `sql:3`, `sql@prod` or `sha256:...`: grammar only. All of
them lie below training and registry, so that neither imports the other, and none knows a folder or a store.

Whoever holds a manifest and the files can prove that they belong together: each file has its sha256, and `digest`
covers everything that decides the answers (weights, deciding configuration, base fingerprint), so that the same
adapter has the same digest on every machine and under every name.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from adapterhub_lite.adapter_format.added_tokens import ADDED_TOKENS_FILE
from adapterhub_lite.adapter_format.lora_config import values_for
from adapterhub_lite.adapter_format.probes import PROBES_FILE as PROBES_FILE
from adapterhub_lite.adapter_format.strict_reading import StrictModel, strict_json
from adapterhub_lite.errors import DataError, IntegrityError, ReferenceSyntaxError, SchemaVersionError

RECORD_FILE = "training_record.json"


class BaseRecord(StrictModel):
    """The base a run started from. `revision` is a 40-hex commit, or None for a local or embedded base.

    `parts` are the digests of what the fingerprint covers, so that a base which is another can be told by what differs.
    `quantization` is a word of `Quantization`, or what a model's own configuration says. `named` is what the adapter's
    configuration called its base, where that is not `id`.
    """

    id: str
    revision: str | None = None
    fingerprint: str
    parts: dict[str, str] = Field(default_factory=dict)
    quantization: str | None = None
    named: str | None = Field(default=None, exclude_if=lambda name: name is None)

    def difference(self, model_id: str, fingerprint: str, parts: Mapping[str, str]) -> str:
        """Say how the base `model_id` is another than this one: both fingerprints, and which parts differ if known."""
        apart = [name for name, digest in parts.items() if self.parts.get(name, digest) != digest]
        what = f"; what differs: {', '.join(apart)}" if apart else ""
        return (
            f"made for {self.id} with the fingerprint {self.fingerprint:.16}..., "
            f"{model_id} here has {fingerprint:.16}...{what}"
        )


class DataRecord(StrictModel):
    """The data a run saw. `fingerprint` is a sha256 over the tokenised rows; `rows` are those kept.

    `truncated` of them were cut to the limit of tokens, and `dropped` more were left out for it.
    """

    id: str
    rows: int
    fingerprint: str
    truncated: int = 0
    dropped: int = 0


# Layouts of examples without a chat template around them.
RAW_LAYOUTS = frozenset({"text", "completion"})


class TextRecord(StrictModel):
    """How texts became tokens: what an adapter that is asked otherwise does not know.

    `end_tokens` are the ids that end an answer; `vocabulary` counts the tokens; `special_tokens` are those by name;
    `layouts` counts the examples by how they were laid out ("whole", "per turn", "marks", "text", "completion").
    `prefill` is what the template writes when it asks (such as `<think>`) and that no answer began with.
    """

    end_tokens: tuple[int, ...] = ()
    vocabulary: int | None = None
    special_tokens: dict[str, str] = Field(default_factory=dict)
    layouts: dict[str, int] = Field(default_factory=dict)
    prefill: str = ""

    @property
    def of_chats(self) -> bool | None:
        """Whether it learned answers to chat messages, not to raw text; None where nothing says it."""
        return any(way not in RAW_LAYOUTS for way in self.layouts) if self.layouts else None


class MemoryRecord(StrictModel):
    """Bytes the plan predicted (None when no plan was made) and the peak that the run measured."""

    predicted_bytes: int | None = None
    measured_peak_bytes: int


class TrainingRecord(StrictModel):
    """Everything needed to say what a run was, and to run it again. `loss_curve` holds (step, training loss) pairs."""

    schema_version: int = 1
    base: BaseRecord
    data: DataRecord
    template_digest: str
    text: TextRecord | None = None
    seeds: dict[str, int]
    hyperparameters: dict[str, Any]
    packages: dict[str, str]
    preset: str
    loss_backend: dict[str, str]
    memory: MemoryRecord
    hardware: dict[str, str | int | float]
    steps: int
    final_loss: float | None = None
    loss_curve: tuple[tuple[int, float], ...] = ()
    wall_seconds: float = Field(ge=0)


def read_record(folder: Path) -> TrainingRecord | None:
    """Read the record beside an adapter, or None where there is none.

    Raises:
        DataError: the file is there but is not a record of this schema.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        return TrainingRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path} is not a training record: {where}: {first['msg']}. Train again, or remove it."
        ) from error


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Folders are named after adapters: these are devices on Windows. `base` is what a server calls the bare base.
RESERVED = {"base", "con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterReference:
    """One adapter, by name (newest version), name and version, name and alias, or digest alone."""

    name: str | None = None
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: "str | AdapterReference") -> "AdapterReference":
        """Read `name`, `name:3`, `name@alias` or `sha256:<64 hex>`.

        Raises:
            ReferenceSyntaxError: anything else.
        """
        if isinstance(text, AdapterReference):
            return text
        if isinstance(text, str):
            if DIGEST.fullmatch(text):
                return cls(digest=text)
            name, version_mark, version = text.partition(":")
            if version_mark and is_name(name) and re.fullmatch(r"[1-9][0-9]{0,8}", version):
                return cls(name=name, version=int(version))
            name, alias_mark, alias = text.partition("@")
            if alias_mark and is_name(name) and is_alias(alias):
                return cls(name=name, alias=alias)
            if is_name(text):
                return cls(name=text)
        raise ReferenceSyntaxError(
            f"Wanted an adapter as 'name', 'name:3', 'name@alias' or 'sha256:<64 hex digits>', got {text!r:.100}."
        )

    def __str__(self) -> str:
        if self.digest:
            return self.digest
        if self.version is not None:
            return f"{self.name}:{self.version}"
        return f"{self.name}@{self.alias}" if self.alias else str(self.name)


def is_name(text: str) -> bool:
    """Whether `text` may name an adapter: 1 to 64 letters, digits, `.`, `_`, `-`, not starting with a mark."""
    return NAME.fullmatch(text) is not None


def name_problem(text: str) -> str | None:
    """Why a new adapter may not be called `text`, or None. Older registries may hold names that are refused now."""
    if not is_name(text):
        return f"Wanted a name of 1 to 64 letters, digits, '.', '_', '-'; got {text!r:.80}."
    if text.partition(".")[0].lower() in RESERVED:
        return f"{text!r} is a reserved word (the bare base, or a device on some systems); choose another name."
    if text.endswith("."):
        return f"{text!r} ends with a full stop, which some file systems leave out; choose another name."
    return None


def is_alias(text: str) -> bool:
    """Whether `text` may be an alias: a name that is not all digits, so that it is never taken for a version."""
    return is_name(text) and not text.isdigit()


SCHEMA_VERSION = 1
MANIFEST_FILE = "adapterhub.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIGNATURE_FILE = "adapterhub.sig.json"
CARD_FILE = "README.md"
ALIASES_FILE = "aliases.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 256 << 10
LOSS_FILE = "loss.svg"
MAX_MANIFEST_BYTES = 1 << 20
MAX_VERSION = 999_999_999

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShortText = Annotated[str, Field(max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LongText = Annotated[str, Field(max_length=20_000)]


class FileRecord(StrictModel):
    """One file of a version: its sha256 (64 hex digits) and its size in bytes."""

    sha256: HexDigest
    size: int = Field(ge=0)


class LoraRecord(StrictModel):
    """What kind of LoRA it is. `modules_bound` of `modules_total` targeted modules of the base have a pair of tensors.

    `scaling` is the factor on B @ A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`; the patterns hold what
    differs for single modules (pattern -> value; the first that fits the end of a module's name counts, as in PEFT).
    `also` says what it changes besides linear layers: embeddings, parameters, rows of tokens, whole modules.
    """

    rank: int = Field(gt=0)
    alpha: Finite
    scaling: Finite
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, Finite] = Field(default_factory=dict)
    modules_bound: int = Field(gt=0)
    modules_total: int = Field(gt=0)
    also: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)

    @property
    def is_plain(self) -> bool:
        """Whether W + scaling * B @ A on linear layers is all there is: no DoRA magnitude, no LoRA bias, nothing `also`."""
        return not (self.use_dora or self.lora_bias or self.also)

    def rank_of(self, module: str) -> int:
        """The rank of the pair on `module` (full dotted name in the base)."""
        return values_for(self.rank_pattern, [module]).get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor on B @ A of the pair on `module` (full dotted name in the base)."""
        rank = self.rank_of(module)
        alpha = values_for(self.alpha_pattern, [module]).get(module, self.alpha)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


class EvaluationRecord(StrictModel):
    """One measured metric, of the adapter and (None when not measured) of the bare base on the same data."""

    metric: ShortText
    adapter_value: Finite
    base_value: Finite | None = None
    data: ShortText


class ParentRecord(StrictModel):
    """One parent of a merge: which adapter, and with what weight."""

    reference: ShortText
    digest: Digest
    weight: Finite


MergeMethod = Literal["cat", "svd", "ties", "dare_ties", "linear"]


class MergeRecipe(StrictModel):
    """How a merge was made; with the parents it is enough to build it again bit for bit.

    `relative_error` is measured: Frobenius norm of (merged delta - exact weighted sum) over that of the exact sum,
    over all modules together.
    """

    method: MergeMethod
    rank: int = Field(gt=0)
    seed: int
    density: Finite | None = None
    relative_error: Finite


class OriginRecord(StrictModel):
    """Where a version came from, as facts: what its publisher calls it decides nothing here.

    `name`, `version` and `aliases` are those of the publisher's manifest and hub, None and empty for plain PEFT;
    `commit` is the 40-hex commit of `repo_id` that was pulled. Both are None for a folder that was handed over.
    """

    repo_id: ShortText | None = None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    name: ShortText | None = None
    version: int | None = None
    aliases: tuple[ShortText, ...] = ()


class AdapterManifest(StrictModel):
    """What one adapter version is. `version` counts from 1 within `name`; `created` is UTC, ISO 8601.

    `name` and `version` are local labels; `origin` has those of the publisher where it was made elsewhere. Its answers
    are JSON after `answer_schema` where there is one and a request asks for nothing else.
    """

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    name: str
    version: int = Field(gt=0, le=MAX_VERSION)
    digest: Digest
    files: dict[str, FileRecord]
    base: BaseRecord
    lora: LoraRecord
    training: TrainingRecord | None = None
    evaluation: tuple[EvaluationRecord, ...] = ()
    task: ShortText | None = None
    examples: tuple[LongText, ...] = ()
    answer_schema: dict[str, Any] | None = Field(default=None, exclude_if=lambda schema: schema is None)
    tags: tuple[ShortText, ...] = ()
    parents: tuple[ParentRecord, ...] = ()
    recipe: MergeRecipe | None = None
    origin: OriginRecord | None = None
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]

    @field_validator("answer_schema", mode="before")
    @classmethod
    def _schema_of_text(cls, value: Any) -> Any:  # text in the file, an object in memory
        return (
            strict_json(value.encode(), what="answer_schema", limit=MAX_MANIFEST_BYTES)
            if isinstance(value, str)
            else value
        )

    @field_serializer("answer_schema")
    def _text_of_schema(self, schema: dict[str, Any] | None) -> str | None:
        return None if schema is None else schema_text(schema)

    @model_validator(mode="after")
    def _named_well(self) -> "AdapterManifest":
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r:.80} is not 1 to 64 letters, digits, '.', '_', '-'")
        return self

    @property
    def reference(self) -> str:
        """`name:version`, which resolves to this manifest for ever."""
        return f"{self.name}:{self.version}"

    def to_bytes(self) -> bytes:
        """The bytes of `adapterhub.json`: canonical (sorted keys), so that equal manifests are equal files."""
        return (
            json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
            + "\n"
        ).encode()

    def published(self) -> "AdapterManifest":
        """The manifest as its maker published it: with the publisher's name and version."""
        if self.origin is None or self.origin.name is None or self.origin.version is None:
            return self.model_copy(update={"origin": None})
        labels = {"name": self.origin.name, "version": self.origin.version, "origin": None}
        return self.model_copy(update=labels)

    def signed_bytes(self) -> bytes:
        """What a signature covers: everything, name, version and base included, but where it was pulled from.

        Fields at their default are left out, so that a field added later changes no signature made before.
        """
        covered = self.model_dump(mode="json", exclude={"origin"}, exclude_defaults=True)
        return b"adapterhub-signature-2\n" + canonical_json(covered)


def read_manifest(content: bytes) -> AdapterManifest:
    """Read the bytes of an `adapterhub.json`.

    Raises:
        SchemaVersionError: a newer version of this project wrote it.
        IntegrityError: it is not a manifest.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{MANIFEST_FILE} has {len(content)} bytes; a manifest has at most {MAX_MANIFEST_BYTES}.")
    try:
        found = strict_json(content, what=MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
    except ValueError as error:
        raise IntegrityError(f"{MANIFEST_FILE} is not a manifest: {error}.") from error
    version = found.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{MANIFEST_FILE} has schema version {version}, this version reads up to {SCHEMA_VERSION}. "
            "Upgrade adapterhub-lite."
        )
    try:
        return AdapterManifest.model_validate_json(content)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise IntegrityError(f"{MANIFEST_FILE} is not a manifest of this schema: {reasons}.") from error


def adapter_digest(
    deciding_config: dict[str, Any],
    files: Mapping[str, FileRecord],
    base_fingerprint: str,
    answer_schema: Mapping[str, Any] | None,
) -> str:
    """The identity of an adapter: over its weights, what decides in its configuration, its base, and, if any, the chat
    template and the tokens that it brings along and the schema of its answers."""
    decided = {"weights": files[WEIGHTS_FILE].sha256, "config": deciding_config, "base": base_fingerprint}
    if TEMPLATE_FILE in files:
        decided["template"] = files[TEMPLATE_FILE].sha256
    if ADDED_TOKENS_FILE in files:
        decided["added_tokens"] = files[ADDED_TOKENS_FILE].sha256
    if answer_schema is not None:
        decided["answer_schema"] = schema_text(answer_schema)
    return "sha256:" + hashlib.sha256(canonical_json(decided)).hexdigest()


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema of answers as it is kept: its order is that of the fields in the answers, so nothing is sorted."""
    return json.dumps(schema, separators=(",", ":"), ensure_ascii=False)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: what digests and signatures are computed over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
