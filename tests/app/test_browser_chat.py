"""The Chat tab in a real browser."""

import re
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

SECONDS = 1000


def pick_task(page: Any, words: str) -> None:
    """Pick a task by the keyboard, as a person would."""
    field = page.locator("#task input")
    field.click()
    field.fill(words)
    field.press("Enter")


def send(page: Any, text: str) -> None:
    """Write a message and send it by Enter."""
    field = page.locator("#question textarea")
    field.fill(text)
    field.press("Enter")


def test_switching_the_task_and_reading_the_streamed_answer(serve: Any, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.goto(serve().url)
    send(page, "hello")
    receipts = page.locator("#transcript .thought-group .title")
    expect(receipts).to_have_count(1, timeout=30 * SECONDS)
    expect(receipts.first).to_contain_text(re.compile(r"base · tiny · \d+ tok/s"), timeout=30 * SECONDS)
    pick_task(page, "event")
    expect(page.locator("#task-about")).to_contain_text("A sentence to a calendar event")
    send(page, "and now")
    expect(receipts.nth(1)).to_contain_text(re.compile(r"event · [0-9a-f]{8} · tiny"), timeout=30 * SECONDS)
    page.screenshot(path=tmp_path / "chat.png")
    assert (tmp_path / "chat.png").stat().st_size > 10_000
    page.close()
