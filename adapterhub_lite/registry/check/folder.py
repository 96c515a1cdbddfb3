"""What an adapter must pass before anything of it is loaded; all its problems in one report. No torch."""

from dataclasses import dataclass, field
from pathlib import Path

from adapterhub_lite.adapter_format.lora_config import ConfigProblems, LoraConfigFile, read_lora_config
from adapterhub_lite.adapter_format.manifest import CARD_FILE, CONFIG_FILE, PROBES_FILE, WEIGHTS_FILE, LoraRecord
from adapterhub_lite.adapter_format.record import RECORD_FILE, TrainingRecord, read_record
from adapterhub_lite.adapter_format.safetensors_header import TensorEntry, nonfinite_tensors, read_tensor_entries
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterRejectedError, DataError
from adapterhub_lite.registry.check.binding import base_modules, bind
from adapterhub_lite.registry.check.survey import ALLOWED_FILES, card_problems, survey_folder

__all__ = ["ALLOWED_FILES", "Inspection", "inspect_adapter"]

SHOWN = 3
PROBES_TENSORS = {"tokens": "I64", "lengths": "I64", "top_ids": "I64", "top_logits": "F32"}


@dataclass
class Inspection:
    """What was found in an adapter folder. With `problems` empty, `config` and `lora` are there."""

    subject: str
    problems: list[str] = field(default_factory=list)
    usable: list[str] = field(default_factory=list)
    config: LoraConfigFile | None = None
    lora: LoraRecord | None = None
    training: TrainingRecord | None = None

    def accepted(self) -> tuple[LoraConfigFile, LoraRecord]:
        """The configuration and the record of an adapter without problems.

        Raises:
            AdapterRejectedError: with every problem found.
        """
        if self.problems or self.config is None or self.lora is None:
            raise AdapterRejectedError(self.subject, self.problems)
        return self.config, self.lora


def inspect_adapter(folder: Path, *, base: ResolvedBase | None = None, subject: str | None = None) -> Inspection:
    """Examine the adapter in `folder`, reading headers first and tensors 1 MiB at a time.

    With `base`, every tensor has to bind to one of its modules. Never raises for what the folder holds.
    """
    found = Inspection(subject or f"The adapter in {folder.name!r:.100}")
    found.usable, found.problems = survey_folder(folder)
    if CONFIG_FILE in found.usable:
        try:
            found.config = read_lora_config((folder / CONFIG_FILE).read_bytes())
        except ConfigProblems as error:
            found.problems += error.problems
    if CARD_FILE in found.usable:
        found.problems += card_problems((folder / CARD_FILE).read_bytes())
    if RECORD_FILE in found.usable:
        try:
            found.training = read_record(folder)
        except DataError as error:
            found.problems.append(str(error).replace(str(folder), ""))
    if WEIGHTS_FILE in found.usable:
        _inspect_weights(found, folder / WEIGHTS_FILE, base)
    if PROBES_FILE in found.usable:
        found.problems += _probe_problems(folder / PROBES_FILE)
    return found


def _inspect_weights(found: Inspection, path: Path, base: ResolvedBase | None) -> None:
    entries = _entries(found, path)
    if entries is None:
        return
    if found.config is not None:
        found.lora, problems = bind(found.config, entries, base_modules(base.folder) if base else None)
        found.problems += problems
    broken = list(nonfinite_tensors(path, entries))
    if broken:
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        found.problems.append(f"NaN or infinite values in {', '.join(f'{n:.120}' for n in broken[:SHOWN])}{more}")


def _probe_problems(path: Path) -> list[str]:
    try:
        entries = read_tensor_entries(path)
    except ValueError as error:
        return [str(error)]
    if {entry.name: entry.dtype for entry in entries} != PROBES_TENSORS:
        return [f"{path.name} does not hold exactly {', '.join(PROBES_TENSORS)}"]
    return [f"{path.name} holds NaN or infinity"] if any(nonfinite_tensors(path, entries)) else []


def _entries(found: Inspection, path: Path) -> list[TensorEntry] | None:
    try:
        return read_tensor_entries(path)
    except ValueError as error:
        found.problems.append(str(error))
        return None
