"""Text from adapters, models and people, made harmless before it reaches the page. Knows nothing of what it means.

Gradio's chat and Markdown components read HTML inside plain text, so whatever was not written here goes through
`shown` (literal HTML text) or `literal_markdown` (literal Markdown text) first.
"""

import html
import re

_MARKDOWN_SIGNS = re.compile(r"[\\`*_{}\[\]()#+\-.!|>~$:@<&\"'/]")


def shown(text: str) -> str:
    """Return `text` so that a component which renders HTML shows exactly these characters."""
    return html.escape(text, quote=True)


def literal_markdown(text: str) -> str:
    """Return `text` on one line so that a Markdown component shows just these characters: no link, image or tag."""
    return _MARKDOWN_SIGNS.sub(lambda sign: f"&#{ord(sign.group())};", " ".join(text.split()))


def one_line(text: str, limit: int = 120) -> str:
    """Return `text` without line breaks, at most `limit` characters, with an ellipsis where it was cut."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1].rstrip() + "…"
