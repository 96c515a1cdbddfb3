"""The Registry tab: search and read versions; promote, roll back, push and pull them, with each step reported."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.charts import draw_loss
from adapterhub_app.display.escape import literal_markdown, sentence
from adapterhub_app.display.task import short_digest
from adapterhub_app.events import at_last
from adapterhub_app.tabs.catalogue import (
    COLUMN_TYPES,
    COLUMN_WIDTHS,
    COLUMNS,
    HISTORY_COLUMNS,
    alias_moves,
    card_text,
    catalogue_rows,
    loss_curve,
    measured_manifest,
    provenance,
    version_choices,
)
from adapterhub_lite.errors import UsageError

Report = Callable[[str], None]


def promote(backend: Backend, user: str | None, reference: str | None, alias: str) -> str:
    """Point an alias at a version; returns what happened.

    Raises:
        UsageError: the person is not an admin, no version is picked, or the alias is not a valid name.
    """
    backend.access.require_admin(user, "promote a version")
    manifest = backend.registry.resolve(_picked(reference))
    before = backend.registry.aliases(manifest.name).get(alias)
    backend.registry.set_alias(manifest.name, alias, version=manifest.version, expect=before or 0)
    was = f"was at version {before}" if before else "is new"
    return f"{manifest.name}@{alias} {was} and is now at version {manifest.version}."


def roll_back(backend: Backend, user: str | None, reference: str | None, alias: str) -> str:
    """Point an alias back at its previous version; returns what happened. Raises as `promote` does."""
    backend.access.require_admin(user, "roll an alias back")
    name = backend.registry.resolve(_picked(reference)).name
    version = backend.registry.rollback(name, alias)
    return f"{name}@{alias} is back at version {version}."


def push(backend: Backend, user: str | None, reference: str | None, repo_id: str) -> Iterator[list[str]]:
    """Publish a version; yields the lines so far, the last of which is the outcome."""

    def work(report: Report) -> str:
        backend.access.require_admin(user, "push to a hub")
        _require_repository(repo_id)
        receipt = backend.registry.push(_picked(reference), repo_id.strip(), endpoint=backend.hub, progress=report)
        how = "Published" if receipt.uploaded else "Already published"
        return f"{how}: {receipt.repo_id} {receipt.tag}, commit {receipt.commit[:12]}."

    yield from _steps(work)


def pull(backend: Backend, user: str | None, repo_id: str, revision: str, name: str) -> Iterator[list[str]]:
    """Pull a published version; yields the lines so far, the last of which is the outcome."""

    def work(report: Report) -> str:
        backend.access.require_admin(user, "pull from a hub")
        _require_repository(repo_id)
        receipt = backend.registry.pull(
            repo_id.strip(),
            revision=revision.strip() or None,
            name=name.strip() or None,
            endpoint=backend.hub,
            progress=report,
        )
        manifest = receipt.manifest
        where = {
            "hub": "fetched and verified",
            "store": "was already in the registry",
            "offline": "taken from the local copy",
        }[receipt.source]
        return f"{manifest.reference} ({short_digest(manifest.digest)}) {where}, commit {receipt.commit[:12]}."

    yield from _steps(work)


def _steps(work: Callable[[Report], str]) -> Iterator[list[str]]:
    """Run `work` in a thread, and yield all lines reported so far each time there is a new one."""
    reported: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            reported.put(work(reported.put))
        except Exception as error:  # the boundary to the page
            reported.put(sentence(error))
        reported.put(None)

    threading.Thread(target=run, name="hub-transfer", daemon=True).start()
    lines: list[str] = []
    while (line := reported.get()) is not None:
        lines.append(line)
        yield list(lines)


def _picked(reference: str | None) -> str:
    if not reference:
        raise UsageError("No version is picked yet. Pick one in the table or the list above.")
    return reference


def _require_repository(repo_id: str) -> None:
    if not repo_id.strip():
        raise UsageError("The repository is missing. Write it as owner/name, such as you/sql-lora.")


def build_registry_tab(backend: Backend, task: gr.Dropdown, tabs: gr.Tabs, shown: list[Any]) -> None:
    """Lay out the tab and connect it to the Chat tab's `task`; `shown` are the events at which it is seen anew."""
    search = gr.Textbox(
        value="", show_label=False, label="Search", placeholder="Search names, tasks, tags, aliases, digests", container=False,
        elem_id="registry-search",
    )  # fmt: skip
    table = gr.Dataframe(
        value=catalogue_rows(backend.registry), headers=list(COLUMNS), datatype=list(COLUMN_TYPES), interactive=False,
        column_widths=list(COLUMN_WIDTHS), max_height=320, show_label=False, label="Adapters", elem_id="registry-table",
        buttons=[], wrap=False,
    )  # fmt: skip
    with gr.Row(equal_height=True, elem_id="registry-picked"):
        picked = gr.Dropdown(
            choices=version_choices(backend.registry), value=None, label="Version", elem_id="registry-version",
            info="Pick a row above, or here", allow_custom_value=True, scale=4,
        )  # fmt: skip
        chat = gr.Button("Use in chat", elem_id="registry-chat", interactive=False, scale=1, min_width=120)
    build_changes(backend, picked, table, search)
    details = build_details()

    def on_row(event: gr.SelectData) -> str:
        return f"{event.row_value[0]}:{event.row_value[1]}"

    def on_pick(reference: str | None) -> list[Any]:
        chosen = gr.Button(interactive=bool(reference))
        if not reference:
            return [chosen, gr.Row(visible=False), "", "", gr.HTML(visible=False), []]
        try:
            manifest = measured_manifest(backend.registry, reference)
            origin, card = provenance(manifest), card_text(manifest)
            moves, curve = alias_moves(backend.registry, manifest.name), loss_curve(manifest)
        except Exception as error:  # the boundary to the page
            return [chosen, gr.Row(visible=True), literal_markdown(sentence(error)), "", gr.HTML(visible=False), []]
        return [chosen, gr.Row(visible=True), origin, card, gr.HTML(draw_loss(curve), visible=bool(curve)), moves]

    def on_chat(reference: str) -> tuple[Any, Any]:
        return gr.Dropdown(value=reference), gr.Tabs(selected="chat")

    def on_search(words: str) -> Any:
        return catalogue_rows(backend.registry, words)

    def on_shown() -> Any:
        return gr.Dropdown(choices=version_choices(backend.registry))

    at_last([*shown, search.change], on_search, search, table)
    at_last(shown, on_shown, None, picked)
    # Of two clicks in a row the last one counts.
    table.select(on_row, None, picked, trigger_mode="multiple", queue=False, show_progress="hidden")
    picked.change(on_pick, picked, [chat, *details], queue=False, show_progress="hidden")
    chat.click(on_chat, picked, [task, tabs], queue=False, show_progress="hidden")


def build_details() -> list[Any]:
    """Lay out (whole row, provenance, card, loss plot, history), hidden until a version is picked."""
    with gr.Row(visible=False, equal_height=False, elem_id="registry-details") as box:
        with gr.Column(scale=1, min_width=300):
            gr.Markdown("### Provenance")
            origin = gr.Markdown(elem_id="registry-provenance", elem_classes="facts")
            curve = gr.HTML(visible=False, padding=False, elem_id="registry-loss")
            gr.Markdown("### Aliases")
            moves = gr.Dataframe(
                headers=list(HISTORY_COLUMNS), datatype="str", interactive=False, max_height=220, show_label=False,
                label="History of aliases", elem_id="registry-history", buttons=[],
            )  # fmt: skip
        with gr.Column(scale=1, min_width=300):
            card = gr.Markdown(elem_id="registry-card", latex_delimiters=[])
    return [box, origin, card, curve, moves]


def build_changes(backend: Backend, picked: gr.Dropdown, table: gr.Dataframe, search: gr.Textbox) -> None:
    """Lay out and connect what changes the registry: promote, roll back, push, pull."""
    with gr.Accordion("Promote, roll back, push, pull", open=False, elem_id="registry-changes"):
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                alias = gr.Textbox(label="Alias", value="prod", max_length=64, elem_id="registry-alias")
                with gr.Row(elem_classes="natural"):
                    up = gr.Button("Promote", elem_id="registry-promote")
                    back = gr.Button("Roll back", elem_id="registry-rollback")
            with gr.Column(min_width=280):
                to = gr.Textbox(label="Push to", placeholder="owner/name", elem_id="registry-push-repo")
                with gr.Row(elem_classes="natural"):
                    out = gr.Button("Push", elem_id="registry-push")
            with gr.Column(min_width=280):
                origin = gr.Textbox(label="Pull from", placeholder="owner/name", elem_id="registry-pull-repo")
                with gr.Row():
                    revision = gr.Textbox(label="Revision", placeholder="newest", min_width=120)
                    name = gr.Textbox(
                        label="As", placeholder="its own name", min_width=120, elem_id="registry-pull-name"
                    )
                with gr.Row(elem_classes="natural"):
                    into = gr.Button("Pull", elem_id="registry-pull")
        steps = gr.Markdown(elem_classes="notice", visible=False, elem_id="registry-steps")
    outputs = [steps, table, picked]

    def ended(lines: list[str], words: str, chosen: str | None) -> list[Any]:
        fresh = gr.Dropdown(choices=version_choices(backend.registry), value=chosen)
        return [_notice(lines), catalogue_rows(backend.registry, words), fresh]

    def at_once(action: Any) -> Any:
        def act(reference: str | None, called: str, words: str, request: gr.Request) -> list[Any]:
            try:
                lines = [action(backend, request.username, reference, called.strip())]
            except Exception as error:  # the boundary to the page
                lines = [sentence(error)]
            return ended(lines, words, reference)

        return act

    def on_push(reference: str | None, repo: str, words: str, request: gr.Request) -> Iterator[list[Any]]:
        lines: list[str] = []
        for lines in push(backend, request.username, reference, repo):
            yield [_notice(lines), gr.skip(), gr.skip()]
        yield ended(lines, words, reference)

    def on_pull(
        reference: str | None, repo: str, at: str, called: str, words: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        lines: list[str] = []
        for lines in pull(backend, request.username, repo, at, called):
            yield [_notice(lines), gr.skip(), gr.skip()]
        yield ended(lines, words, reference)

    quiet = {"trigger_mode": "once", "show_progress": "hidden"}
    up.click(at_once(promote), [picked, alias, search], outputs, **quiet)
    back.click(at_once(roll_back), [picked, alias, search], outputs, **quiet)
    out.click(on_push, [picked, to, search], outputs, **quiet)
    into.click(on_pull, [picked, origin, revision, name, search], outputs, **quiet)


def _notice(lines: list[str]) -> gr.Markdown:
    return gr.Markdown("\n\n".join(literal_markdown(line) for line in lines), visible=True)
