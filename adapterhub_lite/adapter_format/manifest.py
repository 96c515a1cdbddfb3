"""The manifest: what one adapter version is, as the strict JSON of `adapterhub.json`. Knows no folder and no store.

Whoever holds a manifest and the files can prove that they belong together: each file has its sha256, and `digest`
covers everything that decides the answers (weights, deciding configuration, base fingerprint), so that the same
adapter has the same digest on every machine and under every name.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from adapterhub_lite.adapter_format.patterns import values_for
from adapterhub_lite.adapter_format.probes import PROBES_FILE as PROBES_FILE
from adapterhub_lite.adapter_format.record import BaseRecord, StrictModel, TrainingRecord
from adapterhub_lite.adapter_format.reference import is_name
from adapterhub_lite.adapter_format.strict_json import strict_json
from adapterhub_lite.errors import IntegrityError, SchemaVersionError

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

    @property
    def is_plain(self) -> bool:
        """Whether W + scaling * B @ A is all there is: no DoRA magnitude, no LoRA bias."""
        return not (self.use_dora or self.lora_bias)

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


class MergeRecipe(StrictModel):
    """How a merge was made; with the parents it is enough to build it again bit for bit.

    `relative_error` is measured: Frobenius norm of (merged delta - exact weighted sum) over that of the exact sum,
    over all modules together.
    """

    method: Literal["cat", "svd", "ties", "dare_ties", "linear"]
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

    `name` and `version` are local labels; `origin` has those of the publisher where it was made elsewhere.
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
    tags: tuple[ShortText, ...] = ()
    parents: tuple[ParentRecord, ...] = ()
    recipe: MergeRecipe | None = None
    origin: OriginRecord | None = None
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]

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


def adapter_digest(deciding_config: dict[str, Any], weights_sha256: str, base_fingerprint: str) -> str:
    """The identity of an adapter: over its weights, what decides in its configuration, and its base."""
    decided = {"weights": weights_sha256, "config": deciding_config, "base": base_fingerprint}
    return "sha256:" + hashlib.sha256(canonical_json(decided)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: what digests and signatures are computed over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
