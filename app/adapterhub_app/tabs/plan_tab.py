"""The Plan tab's components and what they are wired to. The work is done in plan.py."""

from typing import Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.charts import draw_plan
from adapterhub_app.display.escape import literal_markdown
from adapterhub_app.display.notice import sentence
from adapterhub_app.tabs.plan import GPU, HERE, PlanRequest, answer_plan, base_choices


def build_plan_tab(backend: Backend) -> None:
    """Lay out the tab and wire it."""
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
                "Say what is to be trained where; the plan says which preset fits, and why.",
                elem_classes="plan-text", elem_id="plan-answer",
            )  # fmt: skip

    def on_plan(named: str, rows: int, tokens: int, gib: float, count: int, where: str, width: int) -> tuple[Any, str]:
        try:
            wanted = PlanRequest(named or "", int(rows), int(tokens), float(gib), where, int(count), int(width))
            found = answer_plan(backend, wanted)
        except TypeError:
            return gr.skip(), "A number is missing. Fill every field."
        except Exception as error:  # the page's edge
            return gr.HTML(visible=False), literal_markdown(sentence(error))
        return gr.HTML(draw_plan(found.bars, wanted.memory_gib), visible=True), found.text

    run.click(
        on_plan, [base, batch, length, memory, devices, device, rank], [chart, answer], trigger_mode="once",
        show_progress_on=answer,
    )  # fmt: skip
