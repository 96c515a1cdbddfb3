"""What a person does in a page that takes more than one call of Playwright."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator

A_MOMENT = 500


def fill_unfolded(field: "Locator", words: str) -> None:
    """Type into a field of an accordion that was opened just now, until it stays.

    On a busy machine Gradio draws such a field twice within the first milliseconds, the second time with what it had at first.
    No person types as fast; a field that loses what is typed later fails here.
    """
    for _ in range(3):
        field.fill(words)
        field.page.wait_for_timeout(A_MOMENT)
        if field.input_value() == words:
            return
    raise AssertionError(f"{words!r} does not stay in its field")
