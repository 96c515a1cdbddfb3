"""The Train tab: rows in, a look at how they are learned, a run that can be watched, stopped and kept, a task to chat with."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app import training
from adapterhub_app.backend import Backend
from adapterhub_app.bases import bases_here
from adapterhub_app.display.escape import literal_markdown, sentence
from adapterhub_app.display.runs import left_out_words, rows_are, token_pieces
from adapterhub_app.tabs.run_panel import SHOW_RUN, RunPanel, build_run_panel
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.installation import install_command
from adapterhub_lite.tasks import TASKS
from adapterhub_lite.training.settings import TARGET_GROUPS, TrainingRecipe

SHOWN_ROWS = 3
ITSELF = "(recognised by name)"
OVERLONG = [("Leave it out", "drop"), ("Cut its end", "truncate"), ("Refuse to train", "refuse")]
# The settings of the page, by their names in `TrainingRecipe`; the others keep their defaults.
BASIC = ("epochs", "batch_size", "learning_rate", "rank", "validation_split")
FOLDED = ("steps", "max_length", "accumulation", "seed", "save_steps", "target_modules", "overlong")
PRESET = "memory_preset"
TRAIN, STARTING = "Train", "Checks every row and starts"
NAMES = (*BASIC, PRESET, *FOLDED)
_COLOURS = {"learned": "#1f7a6c", "only seen": "#8a8a84"}


def default_of(name: str) -> Any:
    """The page's default of a setting: that of the recipe, but with rows held out, and five looks at them on the way."""
    own = {"validation_split": training.HELD_OUT, "overlong": "drop", "save_steps": 0.2}
    return own.get(name, TrainingRecipe.__dataclass_fields__[name].default)


def help_of(name: str) -> str:
    """The help of a setting, where it is described."""
    return str(TrainingRecipe.__dataclass_fields__[name].metadata["help"])


def build_train_tab(backend: Backend, task: gr.Dropdown, tabs: gr.Tabs, opened: Any) -> RunPanel | None:
    """Lay out the tab and connect it; None where what trains is not installed, which the tab then says."""
    if find_spec("datasets") is None:
        gr.Markdown(
            f"### Training is not installed here\nGet it with `{install_command('train')}`, then start the app again.",
            elem_classes="notice", elem_id="train-missing",
        )  # fmt: skip
        return None
    file, hub, source_task, prompt, completion = build_source()
    found = gr.Markdown(elem_id="train-found", elem_classes="notice", visible=False)
    with gr.Row(visible=False, elem_id="train-preview", equal_height=False) as preview:
        tokens = [
            gr.HighlightedText(
                label=f"Row {number + 1}", color_map=_COLOURS, show_legend=number == 0, show_inline_category=False,
                combine_adjacent=True, elem_classes="token-row", visible=False, buttons=[],
                min_width=280,
            )
            for number in range(SHOWN_ROWS)
        ]  # fmt: skip
    base, fields = build_settings(backend)
    plan = gr.Markdown(elem_id="train-plan", elem_classes="told")
    with gr.Row(elem_id="train-go", equal_height=True):
        name = gr.Textbox(
            label="Name of the task", value="", placeholder="support-answers", max_length=64, elem_id="train-name",
            info="Letters, digits, dots, dashes", scale=3,
        )  # fmt: skip
        go = gr.Button(TRAIN, variant="primary", elem_id="train-run", scale=1, min_width=140, interactive=False)
    problem = gr.Markdown(elem_classes="problem", visible=False, elem_id="train-problem")
    panel = build_run_panel(backend, task, tabs, opened)
    given = [file, hub, source_task, prompt, completion, *(fields[one] for one in NAMES), base, name]
    shown = [found, preview, *tokens, plan, go, name, prompt, completion]

    fresh = [fields[one].change for one in ("max_length", "overlong", "batch_size", "rank", "target_modules", PRESET)]
    chosen = [file.change, hub.submit, source_task.change, prompt.input, completion.input, base.input, *fresh]
    connect_looking(backend, chosen, given, shown)
    connect_training(backend, panel, given, go, problem)
    quiet = {"queue": False, "show_progress": "hidden"}
    name.change(lambda text: gr.Button(interactive=bool(text.strip())), name, go, **quiet)
    opened(lambda: gr.Dropdown(choices=list(bases_here(backend))), None, base, **quiet)
    return panel


def connect_looking(backend: Backend, chosen: list[Any], given: list[Any], shown: list[Any]) -> None:
    """At each of the events `chosen`, show how the rows that are given are learned; until then, what is being done."""

    def on_look(*values: Any) -> Iterator[list[Any]]:
        asked = Asked.of(values)
        if asked.source.is_named and not backend.durations.is_quick(asked.reading):
            yield waiting_updates(backend.durations.waiting(asked.reading, f"Reads {asked.source.name}"))
        try:
            with backend.durations.measure(asked.reading):
                updates = look_updates(backend, asked)
            yield updates
        except Exception as error:  # the boundary to the page
            yield nothing_to_see(literal_markdown(sentence(error)))

    gr.on(chosen, on_look, given, shown, trigger_mode="always_last", show_progress="hidden")


def connect_training(backend: Backend, panel: RunPanel, given: list[Any], go: gr.Button, problem: gr.Markdown) -> None:
    """Start a run at the press of `go`, which says meanwhile what is being done, and show it in the panel."""

    def on_train(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        asked, hidden = Asked.of(values), gr.Markdown(visible=False)
        doing = backend.durations.waiting("start", STARTING)
        yield [hidden, gr.Button(doing, interactive=False), gr.skip(), *panel.untouched()]
        try:
            with backend.durations.measure("start"):
                recipe = training.recipe_of(asked.settings)
                look = training.look_at(backend, asked.source, recipe, asked.base)
                run = training.start_run(backend, request.username, asked.name, look, recipe)
        except Exception as error:  # the boundary to the page
            told = gr.Markdown(literal_markdown(sentence(error)), visible=True)
            yield [told, gr.Button(TRAIN, interactive=True), gr.skip(), *panel.untouched()]
            return
        yield [hidden, gr.Button(TRAIN, interactive=True), run.name, *panel.updates(run)]

    outputs = [problem, go, panel.picked, *panel.outputs]
    started = go.click(on_train, given, outputs, trigger_mode="once", show_progress="hidden")
    started.then(None, js=SHOW_RUN)


@dataclass(frozen=True)
class Asked:
    """What stands in the tab's fields: rows, settings by their names, the base that was picked, and the task's name."""

    source: training.Source
    settings: dict[str, Any]
    base: str | None
    name: str

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Asked":
        """The fields in the order of the page: five of the source, the settings, base and name."""
        settings = dict(zip(NAMES, values[5:-2], strict=True))
        return cls(source_of(values[:5]), settings, values[-2], str(values[-1] or ""))

    @property
    def reading(self) -> str:
        """The kind of work that reading these rows is, of which it is remembered how long it took."""
        return f"read {self.source.file or self.source.name}"


def build_source() -> tuple[gr.File, gr.Textbox, gr.Radio, gr.Dropdown, gr.Dropdown]:
    """Lay out where rows come from, and which columns they are in."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            file = gr.File(
                label="Rows: CSV, JSONL or parquet", file_types=list(training.FILE_TYPES), height=150,
                elem_id="train-file",
            )  # fmt: skip
        with gr.Column(scale=1, min_width=280):
            hub = gr.Textbox(
                label="Or a data set on the Hub", placeholder="owner/name, then Enter", max_length=200,
                elem_id="train-hub",
            )  # fmt: skip
            task = gr.Radio(
                choices=[(one.description, name) for name, one in TASKS.items()], value=None,
                label="Or an example, made on this machine", elem_id="train-example",
            )  # fmt: skip
    with gr.Row():
        prompt = gr.Dropdown(
            choices=[ITSELF], value=ITSELF, label="Column that is asked", visible=False, elem_id="train-prompt-column"
        )
        completion = gr.Dropdown(
            choices=[ITSELF], value=ITSELF, label="Column that is the answer", visible=False,
            elem_id="train-completion-column",
        )  # fmt: skip
    return file, hub, task, prompt, completion


def build_settings(backend: Backend) -> tuple[gr.Dropdown, dict[str, Any]]:
    """Lay out the base and the settings, six in sight and the rest folded; name -> field."""
    fields: dict[str, Any] = {}
    with gr.Row(elem_id="train-settings"):
        base = gr.Dropdown(
            list(bases_here(backend)), value=backend.base_name if backend.base else None, label="Base", min_width=220, elem_id="train-base",
            info="The served one, or another that lies here",
        )  # fmt: skip
        for name in BASIC:
            fields[name] = number_of(name)
        fields[PRESET] = gr.Dropdown(
            training.preset_choices(), value=default_of(PRESET), label="Memory preset", min_width=220,
            info=help_of(PRESET), elem_id="train-memory-preset",
        )  # fmt: skip
    with gr.Accordion("More settings", open=False, elem_id="train-more"):
        with gr.Row():
            for name in FOLDED[:5]:
                fields[name] = number_of(name)
        with gr.Row():
            fields["target_modules"] = gr.Radio(
                list(TARGET_GROUPS), value=default_of("target_modules"), label="Target modules",
                info=help_of("target_modules"),
            )  # fmt: skip
            fields["overlong"] = gr.Radio(
                OVERLONG, value=default_of("overlong"), label="A row that is too long", elem_id="train-overlong",
                info="What becomes of one that is longer than the maximum length.",
            )  # fmt: skip
    return base, fields


def number_of(name: str) -> gr.Number:
    """The field of a setting that is a number."""
    setting = TrainingRecipe.__dataclass_fields__[name]
    whole = "float" not in str(setting.type)
    return gr.Number(
        value=default_of(name), label=name.replace("_", " ").capitalize(), info=help_of(name), precision=0 if whole else None,
        min_width=150, elem_id=f"train-{name.replace('_', '-')}",
    )  # fmt: skip


def source_of(values: Any) -> training.Source:
    """The source that the five fields name; a file wins over a data set, which wins over an example."""
    file, hub, task, prompt, completion = values
    columns = ["" if one in (None, ITSELF) else str(one) for one in (prompt, completion)]
    if file:
        return training.Source(file=str(file), prompt=columns[0], completion=columns[1])
    if hub and str(hub).strip():
        return training.Source(hub=str(hub).strip(), prompt=columns[0], completion=columns[1])
    return training.Source(task=str(task or ""))


def look_updates(backend: Backend, asked: Asked) -> list[Any]:
    """What the page shows of a source: counts and warnings, the first rows, the plan, and a name to train under."""
    source, recipe = asked.source, training.recipe_of(asked.settings)
    look = training.look_at(backend, source, recipe, asked.base)
    rows, preview = look.rows, look.preview
    columns = [gr.Dropdown(choices=[ITSELF, *rows.columns], visible=len(rows.columns) > 1 and not source.task)] * 2
    if preview is None or not preview.lengths:
        return [*nothing_to_see(no_rows_words(look), wrong=not rows.is_unnamed)[:-2], *columns]
    count = f"{len(rows.found)} row{'' if len(rows.found) == 1 else 's'}"
    parts = [f"**{count}** of {literal_markdown(source.name)}: {literal_markdown(preview.described())}."]
    if rows.left_out:
        first, *listed = left_out_words(rows.left_out, rows.reasons).split("\n")
        parts.append("\n".join([first, "", *(f"- {literal_markdown(one[2:])}" for one in listed)]))
    if preview.refusals:
        refused = literal_markdown(preview.refused[0])
        parts.append(f"{rows_are(preview.refusals)} refused, the first because: {refused}")
    if preview.dropped:
        longer = f"longer than {recipe.max_length} tokens and left out of the training."
        parts.append(f"{rows_are(preview.dropped)} {longer}")
    if rows.unused:
        parts.append(f"Columns that are not used: {literal_markdown(', '.join(rows.unused))}.")
    drawn = [
        gr.HighlightedText(value=token_pieces(row), label=literal_markdown_label(row.where, row.learned), visible=True)
        for row in preview.rows[:SHOWN_ROWS]
    ]
    drawn += [gr.HighlightedText(visible=False)] * (SHOWN_ROWS - len(drawn))
    try:
        plan = plan_words(training.plan_of(backend, look, recipe))
    except AdapterHubError as error:
        plan = literal_markdown(str(error))
    called = asked.name or name_from(source)
    return [
        gr.Markdown("\n\n".join(parts), visible=True, elem_classes=["notice"]), gr.Row(visible=True), *drawn, plan,
        gr.Button(interactive=True), called, *columns,
    ]  # fmt: skip


def no_rows_words(look: training.Look) -> str:
    """Why a source gives nothing to train, and what to do about it."""
    rows, refused = look.rows, look.preview.refused if look.preview else ()
    if rows.is_unnamed and len(rows.columns) > 1:
        said = f"The names of its columns, {literal_markdown(', '.join(rows.columns))}, do not say what they are."
    elif reasons := rows.reasons or refused:
        said = literal_markdown(reasons[0])
    else:
        return "There are no rows in it. Give at least one, below a line with the names of the columns."
    return f"{said}\n\n**Name the column that is asked and the column that is the answer.**" if rows.columns else said


def literal_markdown_label(where: str, learned: int) -> str:
    """The label of a row: where it stands, and how much of it is learned."""
    return f"{Path(where).name if '/' in where else where}: {learned} tokens are learned"


def plan_words(plan: Any) -> str:
    """The plan in two lines: what the run gets and needs, and why."""
    needs = f"{plan.predicted.total / 2**30:.2f} GiB"
    said = " ".join(f"{text[:1].upper()}{text[1:].rstrip('.')}." for text in (plan.preset.summary, *plan.reasons[:2]))
    return f"**{literal_markdown(plan.preset.name)}**, {needs} of memory. {literal_markdown(said)}"


def name_from(source: training.Source) -> str:
    """A name for the task, from that of its rows; letters with marks lose them, as `Straße März` is `strasse-marz`."""
    stem = source.task or Path(source.file or source.hub).stem
    plain = "".join(one for one in unicodedata.normalize("NFKD", stem.casefold()) if not unicodedata.combining(one))
    return re.sub(r"[^a-z0-9.-]+", "-", plain).strip("-.")[:40].rstrip("-.") or "task"


def waiting_updates(doing: str) -> list[Any]:
    """The updates while rows are read: what is being done, and nothing else changes."""
    return [
        gr.Markdown(literal_markdown(doing), visible=True, elem_classes=["notice"]), *[gr.skip()] * (SHOWN_ROWS + 6)
    ]  # fmt: skip


def nothing_to_see(said: str, *, wrong: bool = True) -> list[Any]:
    """The updates of a source that gives no rows, in the colour of what is `wrong` or of what is asked."""
    hidden = [gr.HighlightedText(visible=False)] * SHOWN_ROWS
    return [
        gr.Markdown(said, visible=True, elem_classes=["problem" if wrong else "notice"]), gr.Row(visible=False), *hidden, "",
        gr.Button(interactive=False), gr.skip(),
        gr.skip(), gr.skip(),
    ]  # fmt: skip
