"""Which preset a run gets, and why none of the others. Knows estimates and machines, never data."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import ConfigurationError, OutOfMemoryError
from adapterhub_lite.memory.calibration import calibrated
from adapterhub_lite.memory.estimate import GIB, MemoryEstimate, ModelFacts, Workload, estimate, facts_of
from adapterhub_lite.memory.presets import MEMORY_PRESETS, Machine, MemoryPreset, find_preset, refusal

RULE_OF_THUMB = (
    "one device: a LoRA as it is, then activations made again, then 4 bits; several: a whole copy on each (DDP), then "
    "ZeRO-2, then split weights (FSDP, ZeRO-3), then 4 bits, then the host's memory"
)
"""What `LADDER` says, for people."""

# Best first; a preset that is not here has to be asked for by name.
LADDER = (
    "lora-bf16", "lora-fp16", "lora-bf16-gc", "qlora-nf4", "qlora-nf4-gc", "qlora-nf4-paged",
    "ddp", "zero2", "fsdp", "zero3", "fsdp-qlora", "zero3-offload",
)  # fmt: skip
BY_NAME_ONLY = {
    "full": "an adapter does not need every weight trained",
    "head-only": "a LoRA on the layers learns more",
    "lora-fp32": "it takes twice the memory of 16 bits, and learns no more",
    "lora-int8": "nf4 is smaller and 16 bits are faster",
    "zero1": "ZeRO-2 needs no more and holds less",
}
# Without checkpointing, rows are split this often before activations are made again instead.
MOST_SPLITS_UNCHECKPOINTED = 4
# Allocators leave gaps: what is called free is not all to be had.
USABLE = 0.95


@dataclass(frozen=True)
class Rejection:
    """A preset that was not taken, what it would need (None where that was not reckoned), and why not."""

    preset: str
    predicted: MemoryEstimate | None
    reason: str


@dataclass(frozen=True)
class MemoryPlan:
    """The preset for a run, its bytes by component, and the reasons for it and against each other one."""

    preset: MemoryPreset
    predicted: MemoryEstimate
    batch_size: int
    accumulation: int
    machine: Machine
    reasons: tuple[str, ...]
    rejected: tuple[Rejection, ...] = field(default=())

    def described(self) -> str:
        """The plan as a few lines of text."""
        lines = [f"{self.preset.name}: {self.preset.summary}", *self.reasons, f"needs {self.predicted.described()}"]
        if self.rejected:
            lines.append(f"by rule of thumb, {RULE_OF_THUMB}")
        return "\n".join([*lines, *(f"not {r.preset}: {r.reason}" for r in self.rejected)])


@dataclass(frozen=True)
class _Reckoner:
    """Estimates of one model, each corrected by what was measured here."""

    model: ModelFacts
    home: str | Path | None

    def need(self, preset: MemoryPreset, workload: Workload) -> MemoryEstimate:
        return calibrated(estimate(self.model, preset, workload), home=self.home)

    def shown(self, preset: MemoryPreset, workload: Workload) -> MemoryEstimate | None:
        """The same beside a choice; None where it cannot be foreseen, which is no reason to fail."""
        try:
            return self.need(preset, workload)
        except ConfigurationError:
            return None


def plan_memory(
    base: Any,
    *,
    batch_size: int,
    sequence_length: int,
    device_memory: int | None = None,
    world_size: int = 1,
    rank: int = 8,
    target_modules: Any = "all-linear",
    preset: str = "auto",
    machine: Machine | None = None,
    home: str | Path | None = None,
    candidates: Sequence[MemoryPreset] | None = None,
) -> MemoryPlan:
    """Choose the preset, rows a step and accumulation with which `batch_size` rows a device and update will fit.

    `device_memory` is in bytes, by default what this machine has free; `preset` fixes the choice, and then only rows
    and accumulation are looked for. What runs on this machine measured (`record_peak`) corrects the prediction; `home`
    is where that is kept. `candidates` are the presets that "auto" may take, best first, instead of the whole ladder.

    Raises:
        OutOfMemoryError: nothing fits; the text says what comes closest.
        ConfigurationError: a preset asked for by name that this machine cannot run.
        UnknownNameError: no such base or preset.
    """
    machine = machine or Machine.present(memory_bytes=device_memory, world_size=world_size)
    facts = _Reckoner(base if isinstance(base, ModelFacts) else facts_of(base), home)
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    asked = Workload(batch_size, sequence_length, rank, targets, machine.world_size, 1, machine.device)
    quantized = facts.model.shape(targets).quantized
    if preset != "auto":
        return _by_name(preset, facts, asked, machine, refusal(find_preset(preset), machine, model_quantized=quantized))
    rejected = [] if candidates else _by_name_only(facts, asked, machine, quantized)
    found = None
    for candidate in candidates or [MEMORY_PRESETS[name] for name in LADDER]:
        why = refusal(candidate, machine, model_quantized=quantized)
        if why and not candidates:
            why += _elsewhere(facts, candidate, asked, quantized)
        if found is not None:
            # The rest of the ladder is shown beside the choice.
            needed = None if why else facts.shown(candidate, asked)
            figure = "" if needed is None else f", and this needs {needed.total / GIB:.1f} GiB"
            rejected.append(Rejection(candidate.name, needed, why or f"{found[0].name} fits already{figure}"))
            continue
        best = None if why else _largest_batch(facts, candidate, asked, machine)
        if best is None:
            needed = None if why else facts.need(candidate, asked)
            rejected.append(Rejection(candidate.name, needed, why or _does_not_fit(facts, candidate, asked, machine)))
            continue
        found = candidate, best
        if candidates:
            break
    if found is None:
        raise _nothing_fits(rejected, sequence_length, machine)
    reasons = (_why(found[0], machine), _fit(found[1], machine))
    return _plan(*found, asked, machine, reasons, tuple(rejected))


def _by_name_only(facts: "_Reckoner", asked: Workload, machine: Machine, quantized: bool) -> list[Rejection]:
    """The presets that have to be asked for by name, each with what it would need where it can run at all."""
    rejected = []
    for name, reason in BY_NAME_ONLY.items():
        why = refusal(MEMORY_PRESETS[name], machine, model_quantized=quantized)
        if why:
            why += _elsewhere(facts, MEMORY_PRESETS[name], asked, quantized)
        needed = None if why else facts.shown(MEMORY_PRESETS[name], asked)
        figure = "" if needed is None else f"; it needs {needed.total / GIB:.1f} GiB"
        rejected.append(Rejection(name, needed, why or f"only by name: {reason}{figure}"))
    return rejected


def _elsewhere(facts: "_Reckoner", preset: MemoryPreset, asked: Workload, quantized: bool) -> str:
    """What a preset that cannot run here would need where it can: on this kind of device, two of them if it splits."""
    if quantized:
        return ""
    split = preset.strategy != "single"
    there = replace(asked, world_size=max(2, asked.world_size) if split else 1)
    where = f"each of {there.world_size} devices" if split else "it"
    needed = facts.shown(preset, there)
    return f"; {where} would need {needed.total / GIB:.1f} GiB" if needed else ""


def _by_name(preset: str, facts: "_Reckoner", asked: Workload, machine: Machine, refused: str | None) -> MemoryPlan:
    """The plan of a preset asked for by name: taken even where it does not fit, and said so."""
    if refused is not None:
        raise ConfigurationError(f"The memory preset {preset!r} cannot be used here: {refused}.")
    wanted = find_preset(preset)
    best = _largest_batch(facts, wanted, asked, machine) or facts.need(wanted, asked)
    return _plan(wanted, best, asked, machine, ("asked for by name", _fit(best, machine)), ())


def _nothing_fits(
    rejected: Sequence[Rejection], sequence_length: int, machine: Machine
) -> ConfigurationError | OutOfMemoryError:
    tried = [r for r in rejected if r.predicted and r.reason.startswith("needs")]
    if not tried:
        reasons_given = "; ".join(dict.fromkeys(f"{r.preset}: {r.reason}" for r in rejected))
        return ConfigurationError(f"No memory preset can be used here: {reasons_given}.")
    smallest = min(tried, key=lambda r: r.predicted.total if r.predicted else 0)
    return OutOfMemoryError(
        f"No memory preset fits {sequence_length} tokens a row into {machine.memory_bytes / GIB:.1f} GiB: the "
        f"smallest, {smallest.preset}, {smallest.reason}. Use shorter rows, a smaller base, or a larger device."
    )


def _plan(
    preset: MemoryPreset,
    predicted: MemoryEstimate,
    asked: Workload,
    machine: Machine,
    reasons: tuple[str, ...],
    rejected: tuple[Rejection, ...],
) -> MemoryPlan:
    rows, accumulation = predicted.workload.batch_size, predicted.workload.accumulation
    if accumulation > 1:
        reasons += (f"{rows} rows at a time, {accumulation} times an update, keeps the {asked.batch_size} asked for",)
    return MemoryPlan(preset, predicted, rows, accumulation, machine, reasons, rejected)


def _largest_batch(facts: _Reckoner, preset: MemoryPreset, asked: Workload, machine: Machine) -> MemoryEstimate | None:
    """The estimate of the largest batch that fits and divides the rows asked for; None if one row does not."""
    for times in range(1, asked.batch_size + 1):
        if asked.batch_size % times:
            continue
        if not preset.gradient_checkpointing and times > MOST_SPLITS_UNCHECKPOINTED:
            return None
        found = facts.need(preset, _split(asked, times))
        if found.total <= machine.memory_bytes * USABLE:
            return found
    return None


def _split(asked: Workload, times: int) -> Workload:
    return Workload(
        asked.batch_size // times,
        asked.sequence_length,
        asked.rank,
        asked.target_modules,
        asked.world_size,
        times,
        asked.device,
    )


def _fit(found: MemoryEstimate, machine: Machine) -> str:
    verdict = "fits into" if found.total <= machine.memory_bytes * USABLE else "is more than"
    return f"{found.total / GIB:.1f} GiB {verdict} {machine.memory_bytes / GIB:.1f} GiB of {machine.device} memory"


def _why(preset: MemoryPreset, machine: Machine) -> str:
    if machine.world_size > 1:
        return f"the least splitting over {machine.world_size} devices that fits"
    if preset.quantization:
        return "16-bit weights do not fit, 4-bit ones do"
    if preset.gradient_checkpointing:
        return "the weights fit, all activations do not"
    return "everything fits as it is, which is fastest"


def _does_not_fit(facts: _Reckoner, preset: MemoryPreset, asked: Workload, machine: Machine) -> str:
    needed = facts.need(preset, asked).total / GIB
    reason = f"needs {needed:.1f} GiB of {machine.memory_bytes * USABLE / GIB:.1f} GiB usable"
    if asked.batch_size > 1:
        times = asked.batch_size if preset.gradient_checkpointing else min(asked.batch_size, MOST_SPLITS_UNCHECKPOINTED)
        times = max(t for t in range(1, times + 1) if asked.batch_size % t == 0)
        least = facts.need(preset, _split(asked, times))
        reason += f", and {least.total / GIB:.1f} GiB with {least.workload.batch_size} rows at a time"
    return reason
