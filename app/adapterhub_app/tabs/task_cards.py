"""The tasks as cards, each in its own colour: what it does, its score and version; a click or a number key switches."""

import gradio as gr

from adapterhub_app.backend import Backend
from adapterhub_app.display.colours import COLOURS, colour_of, task_colours
from adapterhub_app.display.escape import in_template, one_line
from adapterhub_app.display.task import BASE, fits, newest_versions
from adapterhub_lite.registry import AdapterManifest

# Keys 1 to 9: the base, and an adapter for each colour.
MOST_CARDS = 1 + COLOURS
# The pressed card is marked at once, before the server has answered.
_ON_CLICK = """element.addEventListener('click', event => {
  const card = event.target.closest('button[data-task]')
  if (!card) return
  element.querySelectorAll('button[data-task]').forEach(one => one.setAttribute('aria-pressed', one === card))
  trigger('select', {index: 0, value: card.dataset.task})
})"""
# In the page, too: of two clicks in a row Gradio would pass on to the server only the first.
_PICKED = """() => [document.querySelector('#task-cards button[aria-pressed=true]').dataset.task]"""
# Alt and a number anywhere; the number alone where nothing is being typed.
NUMBER_KEYS = """() => {
  if (window.numberKeysSwitch) return
  window.numberKeysSwitch = true
  document.addEventListener('keydown', event => {
    const digit = /^Digit([1-9])$/.exec(event.code)
    if (!digit || event.ctrlKey || event.metaKey) return
    if (!event.altKey && event.target.closest('input, textarea, select, [contenteditable]')) return
    const card = document.querySelectorAll('#task-cards button[data-task]')[digit[1] - 1]
    if (!card || card.offsetParent === null) return
    event.preventDefault()
    card.click()
  })
}"""


def draw_cards(backend: Backend, picked: str | None) -> str:
    """The base and the newest version of every adapter that fits it as buttons; `picked` is pressed."""
    colours = task_colours(backend.registry.list())
    cards = [card_of(1, BASE, "base", f"{backend.base_name}, without an adapter", "", picked, "task-base")]
    for number, manifest in enumerate(newest_here(backend)[: MOST_CARDS - 1], start=2):
        about = one_line(manifest.task or "no description", 90)
        name, figures = manifest.name, figures_of(backend, manifest)
        cards.append(card_of(number, name, name, about, figures, picked, colour_of(name, colours)))
    return f'<div class="task-cards" role="group" aria-label="Switch the task">{"".join(cards)}</div>'


def newest_here(backend: Backend) -> list[AdapterManifest]:
    """The newest versions that the served base can answer with."""
    return [one for one in newest_versions(backend.registry) if fits(one, backend.engine.base_fingerprint)]


def card_of(number: int, value: str, name: str, about: str, figures: str, picked: str | None, colour: str) -> str:
    """One card; `number` is the key that presses it."""
    pressed = "true" if value == (picked or BASE) else "false"
    tail = f"<small>{in_template(figures)}</small>" if figures else ""
    return (
        f'<button type="button" class="{colour}" data-task="{in_template(value)}" aria-pressed="{pressed}" '
        f'aria-keyshortcuts="Alt+{number}"><kbd>{number}</kbd><b>{in_template(name)}</b>'
        f"<span>{in_template(about)}</span>{tail}</button>"
    )


def figures_of(backend: Backend, manifest: AdapterManifest) -> str:
    """The version and its first score, as on the card."""
    scores = backend.registry.show(manifest.reference).evaluation
    score = f" · {scores[0].metric.replace('_', ' ')} {scores[0].adapter_value:.2f}" if scores else ""
    return f"version {manifest.version}{score}"


def build_task_cards(backend: Backend, task: gr.Dropdown) -> gr.HTML:
    """Lay the cards out and connect them to the task picker."""
    cards = gr.HTML(
        draw_cards(backend, BASE), js_on_load=_ON_CLICK, padding=False, elem_id="task-cards", apply_default_css=False
    )

    cards.select(None, None, task, js=_PICKED, show_progress="hidden")
    return cards
