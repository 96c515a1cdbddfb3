"""The Plan tab's handlers: a base and a device in, the memory of every preset and an explained choice out."""

import re
from dataclasses import dataclass, replace

from adapterhub_app.backend import Backend
from adapterhub_app.display.escape import literal_markdown
from adapterhub_lite.bases import EMBEDDED_BASES
from adapterhub_lite.errors import UsageError
from adapterhub_lite.memory import Machine, MemoryEstimate, plan_memory

GIB = 2**30
HERE = "this machine"
GPU = "a CUDA GPU"
# A Hub id, never a path: people on the page don't get to look around on this machine's disk.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# The oldest kind of GPU that computes bf16 itself.
_AMPERE = (8, 0)


@dataclass(frozen=True)
class PlanRequest:
    """What is to be trained where: rows an update, tokens a row, `memory_gib` of one device, how many devices."""

    base: str
    batch_size: int = 8
    sequence_length: int = 512
    memory_gib: float = 8.0
    device: str = HERE
    devices: int = 1
    rank: int = 8


@dataclass(frozen=True)
class PlanAnswer:
    """The choice as Markdown, and (preset, component, GiB) of every preset reckoned, the chosen one first."""

    text: str
    bars: tuple[tuple[str, str, float], ...]


def base_choices(backend: Backend) -> list[str]:
    """The bases that can be picked: the one served here, and the embedded ones."""
    return list(dict.fromkeys([backend.base_name, *EMBEDDED_BASES]))


def answer_plan(backend: Backend, wanted: PlanRequest) -> PlanAnswer:
    """Plan a run.

    Raises:
        UsageError: the base is not one to be picked and no Hub id, or a number makes no sense.
        OutOfMemoryError: nothing fits; the text says what comes closest.
    """
    if wanted.memory_gib <= 0:
        raise UsageError(f"The device's memory is {wanted.memory_gib:g} GiB, wanted more than 0.")
    machine = Machine.present(memory_bytes=int(wanted.memory_gib * GIB), world_size=max(1, wanted.devices))
    if wanted.device == GPU:
        machine = replace(machine, device="cuda", capability=machine.capability or _AMPERE)
    plan = plan_memory(
        _base(backend, wanted.base),
        batch_size=wanted.batch_size,
        sequence_length=wanted.sequence_length,
        rank=wanted.rank,
        machine=machine,
    )
    reasons = "\n".join(f"- {literal_markdown(reason)}" for reason in plan.reasons)
    others = "\n".join(f"- **{r.preset}** {literal_markdown(r.reason)}" for r in plan.rejected)
    head = f"### {plan.preset.name}\n{literal_markdown(plan.preset.summary)}"
    text = f"{head}\n\n{reasons}\n\n### Not taken\n{others}" if others else f"{head}\n\n{reasons}"
    reckoned = [(plan.preset.name, plan.predicted)]
    reckoned += [(r.preset, r.predicted) for r in plan.rejected if r.predicted is not None]
    return PlanAnswer(text, tuple(bar for name, estimate in reckoned for bar in _bars(name, estimate)))


def _bars(name: str, estimate: MemoryEstimate) -> list[tuple[str, str, float]]:
    return [(name, component, round(size / GIB, 3)) for component, size in estimate.components.items() if size]


def _base(backend: Backend, name: str) -> object:
    if backend.base is not None and name == backend.base_name:
        return backend.base
    if name in EMBEDDED_BASES or _HUB_ID.fullmatch(name):
        return name
    raise UsageError(f"Wanted a base from the list or a Hub id such as org/model, got {name!r:.80}.")
