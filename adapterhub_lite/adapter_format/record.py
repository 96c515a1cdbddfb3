"""The training record: what a run was, as JSON beside its adapter. Training writes it, the registry keeps it.

Lies below both rooms so that neither imports the other. Unknown keys are refused on reading.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub_lite.errors import DataError

RECORD_FILE = "training_record.json"


class StrictModel(BaseModel):
    """A frozen value object read from JSON: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseRecord(StrictModel):
    """The base a run started from. `revision` is a 40-hex commit, or None for a local or embedded base.

    `parts` are the digests of what the fingerprint covers, so that a base which is another can be told by what differs.
    `quantization` is a word of `Quantization`, or what a model's own configuration says. `named` is what the adapter's
    configuration called its base, where that is not `id`.
    """

    id: str
    revision: str | None = None
    fingerprint: str
    parts: dict[str, str] = {}
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


class TextRecord(StrictModel):
    """How texts became tokens: what an adapter that is asked otherwise does not know.

    `end_tokens` are the ids that end an answer; `vocabulary` counts the tokens; `special_tokens` are those by name;
    `layouts` counts the examples by how they were laid out ("whole", "per turn", "marks", "text", "completion").
    """

    end_tokens: tuple[int, ...] = ()
    vocabulary: int | None = None
    special_tokens: dict[str, str] = {}
    layouts: dict[str, int] = {}


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
