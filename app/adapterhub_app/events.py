"""How handlers are connected to events where the order of the answers matters."""

from collections.abc import Callable
from typing import Any  # Gradio is untyped: its components, events and updates are Any

import gradio as gr


def at_last(events: list[Any], handler: Callable[..., Any], given: Any, drawn: Any) -> None:
    """At each of the events draw what there is to say (of `given`).

    One connection for all of them: an answer to an earlier event cannot arrive after the answer to a later one.
    """
    gr.on(events, handler, given, drawn, trigger_mode="always_last", queue=False, show_progress="hidden")
