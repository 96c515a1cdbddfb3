"""The Plan tab: a base and a device in; the memory of every preset and an explained choice out."""

import re
from dataclasses import dataclass, replace
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.charts import draw_plan
from adapterhub_app.display.escape import literal_markdown, sentence
from adapterhub_lite.bases import EMBEDDED_BASES, ResolvedBase
from adapterhub_lite.errors import UsageError
from adapterhub_lite.memory import Machine, plan_memory

GIB = 2**30
HERE = "this machine"
GPU = "a CUDA GPU"
# A Hub id, never a path: people on the page must not be able to probe this machine's disk.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# The oldest GPU architecture with bf16 arithmetic.
_AMPERE = (8, 0)


@dataclass(frozen=True)
class PlanRequest:
    """What to train and where: rows per update, tokens per row, GiB of memory per device, number of devices."""

    base: str
    batch_size: int = 8
    sequence_length: int = 512
    memory_gib: float = 8.0
    device: str = HERE
    devices: int = 1
    rank: int = 8


@dataclass(frozen=True)
class PlanAnswer:
    """The choice as Markdown, and (preset, component, GiB) of every estimated preset, the chosen one first."""

    text: str
    bars: tuple[tuple[str, str, float], ...]


def base_choices(backend: Backend) -> list[str]:
    """The bases to pick from: the one served here, and the embedded ones."""
    return list(dict.fromkeys([backend.base_name, *EMBEDDED_BASES]))


def answer_plan(backend: Backend, request: PlanRequest) -> PlanAnswer:
    """Plan a run.

    Raises:
        UsageError: the base is neither in the list nor a Hub id, or a number makes no sense.
        OutOfMemoryError: nothing fits; the text says what comes closest.
    """
    if request.memory_gib <= 0:
        raise UsageError(f"The device's memory is {request.memory_gib:g} GiB; it must be more than 0.")
    machine = Machine.present(memory_bytes=int(request.memory_gib * GIB), world_size=max(1, request.devices))
    if request.device == GPU:
        machine = replace(machine, device="cuda", capability=machine.capability or _AMPERE)
    base: str | ResolvedBase
    if backend.base is not None and request.base == backend.base_name:
        base = backend.base
    elif request.base in EMBEDDED_BASES or _HUB_ID.fullmatch(request.base):
        base = request.base
    else:
        raise UsageError(f"Expected a base from the list or a Hub id such as org/model, got {request.base!r:.80}.")
    plan = plan_memory(
        base,
        batch_size=request.batch_size,
        sequence_length=request.sequence_length,
        rank=request.rank,
        machine=machine,
    )
    reasons = "\n".join(f"- {literal_markdown(reason)}" for reason in plan.reasons)
    others = "\n".join(f"- **{r.preset}** {literal_markdown(r.reason)}" for r in plan.rejected)
    head = f"### {plan.preset.name}\n{literal_markdown(plan.preset.summary)}"
    text = f"{head}\n\n{reasons}\n\n### Not chosen\n{others}" if others else f"{head}\n\n{reasons}"
    estimates = [(plan.preset.name, plan.predicted)]
    estimates += [(r.preset, r.predicted) for r in plan.rejected if r.predicted is not None]
    return PlanAnswer(
        text,
        tuple(
            (name, component, round(size / GIB, 3))
            for name, estimate in estimates
            for component, size in estimate.components.items()
            if size
        ),
    )


def build_plan_tab(backend: Backend) -> None:
    """Lay out the tab and connect it."""
    bases = base_choices(backend)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            base = gr.Dropdown(
                choices=bases, value=bases[0], label="Base", allow_custom_value=True, elem_id="plan-base",
                info="From the list, or a Hub id such as org/model",
            )  # fmt: skip
            with gr.Row():
                batch = gr.Number(label="Rows per update", value=8, precision=0, minimum=1, min_width=110)
                length = gr.Number(label="Tokens per row", value=512, precision=0, minimum=8, min_width=110)
            with gr.Row():
                memory = gr.Number(
                    label="Device memory, GiB", value=8, minimum=0.1, min_width=110, elem_id="plan-memory"
                )
                devices = gr.Number(label="Devices", value=1, precision=0, minimum=1, min_width=110)
            with gr.Row():
                device = gr.Radio(choices=[HERE, GPU], value=HERE, label="Device", min_width=110)
                rank = gr.Number(label="LoRA rank", value=8, precision=0, minimum=1, min_width=110)
            with gr.Row(elem_classes="natural"):
                run = gr.Button("Plan", variant="primary", elem_id="plan-run")
        with gr.Column(scale=2, min_width=300):
            chart = gr.HTML(visible=False, padding=False, elem_id="plan-chart")
            answer = gr.Markdown(
                "Describe what to train and where; the plan says which preset fits, and why.",
                elem_classes="plan-text", elem_id="plan-answer",
            )  # fmt: skip

    def on_plan(named: str, rows: int, tokens: int, gib: float, count: int, where: str, width: int) -> tuple[Any, str]:
        try:
            request = PlanRequest(named or "", int(rows), int(tokens), float(gib), where, int(count), int(width))
            found = answer_plan(backend, request)
        except TypeError:
            return gr.skip(), "A number is missing. Fill every field."
        except Exception as error:  # the boundary to the page
            return gr.HTML(visible=False), literal_markdown(sentence(error))
        return gr.HTML(draw_plan(found.bars, request.memory_gib), visible=True), found.text

    run.click(
        on_plan, [base, batch, length, memory, devices, device, rank], [chart, answer], trigger_mode="once",
        show_progress_on=answer,
    )  # fmt: skip
