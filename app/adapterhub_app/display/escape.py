"""Text made safe to show: literal characters instead of markup, and one sentence instead of a traceback.

Gradio's chat and Markdown components read HTML inside plain text, so everything that was not written here passes
through `shown` (literal HTML text) or `literal_markdown` (literal Markdown text) first.
"""

import html
import logging
import re

from adapterhub_lite.errors import AdapterHubError

LOG = logging.getLogger("adapterhub_lite.app")
_TEMPLATE_SIGNS = re.compile(r"[${}`\\]")
_MARKDOWN_SIGNS = re.compile(r"[\\`*_{}\[\]()#+\-.!|>~$:@<&\"'/]")


def shown(text: str) -> str:
    """Return `text` so that a component that renders HTML shows exactly these characters."""
    return html.escape(text, quote=True)


def in_template(text: str) -> str:
    """As `shown`, for values of `gr.HTML`, which reads `${...}` and `{{...}}` in what it is given as a template."""
    return _TEMPLATE_SIGNS.sub(lambda sign: f"&#{ord(sign.group())};", shown(text))


def literal_markdown(text: str) -> str:
    """Return `text` on one line so that a Markdown component shows exactly these characters: no link, image or tag."""
    return _MARKDOWN_SIGNS.sub(lambda sign: f"&#{ord(sign.group())};", " ".join(text.split()))


def one_line(text: str, limit: int = 120) -> str:
    """Return `text` without line breaks, at most `limit` characters, with an ellipsis if it was cut."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1].rstrip() + "…"


def sentence(error: Exception) -> str:
    """Describe an error in one sentence. An unexpected one is logged with its traceback; the page shows only its type."""
    if isinstance(error, AdapterHubError):
        return str(error)
    LOG.error("unexpected error in the app", exc_info=error)
    return f"Something went wrong inside the app ({type(error).__name__}); its log has the details. Try again."
