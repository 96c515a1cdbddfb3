"""Which preset a run gets, and why none of the others. Knows estimates and machines, never data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import ConfigurationError, OutOfMemoryError
from adapterhub_lite.memory.calibration import calibrated
from adapterhub_lite.memory.estimate import GIB, MemoryEstimate, ModelFacts, Workload, estimate, facts_of
from adapterhub_lite.memory.presets import MEMORY_PRESETS, Machine, MemoryPreset, find_preset, refusal

RULE_OF_THUMB = (
    "one device: LoRA in 16 bits, then activations recomputed, then 4 bits; several: a whole copy on each (DDP), then "
    "ZeRO-2, then split weights (FSDP, ZeRO-3), then 4 bits, then the host's memory"
)
"""`LADDER` in words."""

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
# Without checkpointing, rows are split this often before activations are recomputed instead.
MOST_SPLITS_UNCHECKPOINTED = 4
# Allocators leave gaps: not all that is reported free can be used.
USABLE = 0.95


@dataclass(frozen=True)
class Rejection:
    """A preset that was not taken, what it would need (None where that was not estimated), and why not."""

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
        needs = f"needs {self.predicted.described()}"
        lines = [f"{self.preset.name}: {self.preset.summary}", *self.reasons, needs]
        if self.rejected:
            lines.append(f"by rule of thumb, {RULE_OF_THUMB}")
        return "\n".join([*lines, *(f"not {r.preset}: {r.reason}" for r in self.rejected)])


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
    """Choose the preset, rows per step and accumulation with which `batch_size` rows per device and update will fit.

    `device_memory` is in bytes, by default what this machine has free; `preset` fixes the choice, and then only rows
    and accumulation are chosen. What runs on this machine measured (`record_peak`) corrects the prediction; `home` is
    where that is kept. `candidates` are the presets that "auto" may take, best first, instead of the whole ladder.

    A model whose layers cannot be traced is planned by what is known of it, which is a lower bound: the estimate and
    the reasons say so.

    Raises:
        OutOfMemoryError: nothing fits; the text says what comes closest.
        ConfigurationError: a preset asked for by name that this machine cannot run.
        UnknownNameError: no such base or preset.
    """
    machine = machine or Machine.present(memory_bytes=device_memory, world_size=world_size)
    targets = tuple(target_modules) if isinstance(target_modules, list) else target_modules
    asked = Workload(batch_size, sequence_length, rank, targets, machine.world_size, 1, machine.device)
    planner = _Planner(base if isinstance(base, ModelFacts) else facts_of(base), asked, machine, home)
    if preset != "auto":
        return planner.by_name(find_preset(preset))
    if candidates:
        return planner.best(candidates)
    return planner.best([MEMORY_PRESETS[name] for name in LADDER], BY_NAME_ONLY)


@dataclass(frozen=True)
class _Planner:
    """One question about one model: estimates corrected by what was measured here, and the choice among presets."""

    facts: ModelFacts
    asked: Workload
    machine: Machine
    home: str | Path | None

    @property
    def usable(self) -> float:
        """Bytes of the device that can be counted on."""
        return self.machine.memory_bytes * USABLE

    def need(self, preset: MemoryPreset, times: int = 1) -> MemoryEstimate:
        """The estimate with the rows asked for, split into `times` steps per update."""
        workload = replace(self.asked, batch_size=self.asked.batch_size // times, accumulation=times)
        return calibrated(estimate(self.facts, preset, workload), home=self.home)

    def largest_batch(self, preset: MemoryPreset) -> MemoryEstimate | None:
        """The estimate of the largest batch that fits and divides the rows asked for; None if there is none."""
        for times in self.splits(preset):
            found = self.need(preset, times)
            if found.total <= self.usable:
                return found
        return None

    def splits(self, preset: MemoryPreset) -> list[int]:
        """Into how many steps the rows of an update may be split under `preset`, ascending."""
        most = self.asked.batch_size if preset.gradient_checkpointing else MOST_SPLITS_UNCHECKPOINTED
        return [n for n in range(1, min(most, self.asked.batch_size) + 1) if self.asked.batch_size % n == 0]

    def refusal(self, preset: MemoryPreset) -> str | None:
        """Why this machine cannot run `preset` on this model."""
        return refusal(preset, self.machine, model_quantized=self.facts.quantized)

    def by_name(self, preset: MemoryPreset) -> MemoryPlan:
        """The plan of a preset asked for by name: taken even where it does not fit, and said so."""
        refused = self.refusal(preset)
        if refused is not None:
            raise ConfigurationError(f"The memory preset {preset.name!r} cannot be used here: {refused}.")
        return self.plan(preset, self.largest_batch(preset) or self.need(preset), ("asked for by name",), ())

    def best(self, ladder: Sequence[MemoryPreset], by_name_only: Mapping[str, str] | None = None) -> MemoryPlan:
        """The first preset of the ladder that fits; with `by_name_only`, all others are shown beside it."""
        found: tuple[MemoryPreset, MemoryEstimate] | None = None
        rejected = [
            self.rejection(MEMORY_PRESETS[name], f"only by name: {reason}; it needs")
            for name, reason in (by_name_only or {}).items()
        ]
        for preset in ladder:
            if found is not None:
                rejected.append(self.rejection(preset, f"{found[0].name} fits already, and this needs"))
                continue
            fitting = None if self.refusal(preset) else self.largest_batch(preset)
            if fitting is None:
                rejected.append(self.rejection(preset, None, elsewhere=by_name_only is not None))
                continue
            found = preset, fitting
            if by_name_only is None:
                break
        if found is None:
            raise self.nothing_fits(rejected)
        preset, fitting = found
        if self.machine.world_size > 1:
            why = f"the least splitting over {self.machine.world_size} devices that fits"
        elif preset.quantization:
            why = "16-bit weights do not fit, 4-bit ones do"
        elif preset.gradient_checkpointing:
            why = "the weights fit, all activations do not"
        else:
            why = "everything fits as it is, which is fastest"
        return self.plan(preset, fitting, (why,), tuple(rejected))

    def rejection(self, preset: MemoryPreset, reason: str | None, *, elsewhere: bool = True) -> Rejection:
        """Why `preset` is not taken, with its figure: `reason`, or that it cannot run or does not fit here."""
        refused = self.refusal(preset)
        if refused is not None:
            return Rejection(preset.name, None, refused + (self.elsewhere(preset) if elsewhere else ""))
        needed = self.need(preset)
        figure = f"{'at least ' * bool(needed.unpredicted)}{needed.total / GIB:.1f} GiB"
        if reason is not None:
            return Rejection(preset.name, needed, f"{reason} {figure}")
        reason = f"needs {figure} of {self.usable / GIB:.1f} GiB usable"
        if self.asked.batch_size > 1:
            least = self.need(preset, self.splits(preset)[-1])
            reason += f", and {least.total / GIB:.1f} GiB with {least.workload.batch_size} rows at a time"
        return Rejection(preset.name, needed, reason)

    def elsewhere(self, preset: MemoryPreset) -> str:
        """What a preset that cannot run here would need where it can: on this kind of device, two of them if it splits."""
        if self.facts.quantized:
            return ""
        split = preset.strategy != "single"
        there = replace(self, asked=replace(self.asked, world_size=max(2, self.asked.world_size) if split else 1))
        where = f"each of {there.asked.world_size} devices" if split else "it"
        return f"; {where} would need {there.need(preset).total / GIB:.1f} GiB"

    def plan(
        self, preset: MemoryPreset, found: MemoryEstimate, reasons: tuple[str, ...], rejected: tuple[Rejection, ...]
    ) -> MemoryPlan:
        """The plan, with the reasons that its figures give."""
        rows, times = found.workload.batch_size, found.workload.accumulation
        verdict = "fits into" if found.total <= self.usable else "is more than"
        least = "at least " if found.unpredicted else ""
        reasons += (
            f"{least}{found.total / GIB:.1f} GiB {verdict} {self.machine.memory_bytes / GIB:.1f} GiB of "
            f"{self.machine.device} memory",
        )
        if found.unpredicted:
            reasons += (f"activations are not predicted, and the run will measure them: {found.unpredicted}",)
        if times > 1:
            reasons += (
                f"{rows} rows at a time, {times} times per update, keeps the {self.asked.batch_size} asked for",
            )
        return MemoryPlan(preset, found, rows, times, self.machine, reasons, rejected)

    def nothing_fits(self, rejected: Sequence[Rejection]) -> ConfigurationError | OutOfMemoryError:
        """The error that says what comes closest."""
        tried = [(r.predicted.total, r) for r in rejected if r.predicted and r.reason.startswith("needs")]
        if not tried:
            reasons = "; ".join(dict.fromkeys(f"{r.preset}: {r.reason}" for r in rejected))
            return ConfigurationError(f"No memory preset can be used here: {reasons}.")
        smallest = min(tried, key=lambda one: one[0])[1]
        return OutOfMemoryError(
            f"No memory preset fits {self.asked.sequence_length} tokens per row into "
            f"{self.machine.memory_bytes / GIB:.1f} GiB: the smallest, {smallest.preset}, {smallest.reason}. "
            "Use shorter rows, a smaller base, or a larger device."
        )
