"""The Chat tab in a real browser: switching, streaming, stopping, eight people at once, a restart in mid-chat."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from adapterhub_lite.serving.engine.core import EngineCore
from tests.app.gestures import fill_unfolded
from tests.app.world import Hand, Serve

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 30_000
RECEIPTS = "#transcript .thought-group .title"


def send(page: "Page", text: str) -> None:
    """Write a message and send it by Enter."""
    field = page.locator("#question textarea")
    field.fill(text)
    field.press("Enter")


def test_switching_the_task_and_reading_the_streamed_answer(
    serve: Serve, page: "Page", hand: Hand, tmp_path: Path
) -> None:
    page.goto(serve().url)
    send(page, "hello")
    receipts = page.locator(RECEIPTS)
    expect(receipts.first).to_contain_text(re.compile(r"base · tiny · \d+ tok/s"), timeout=PATIENCE)
    hand(page, "#task", "event")
    expect(page.locator("#task-about")).to_contain_text("A sentence to a calendar event")
    page.locator("#examples button").first.click()
    expect(page.locator("#question textarea")).to_have_value("Lunch with Ana on Friday")
    page.locator("#question textarea").press("Enter")
    expect(receipts.nth(1)).to_contain_text(re.compile(r"event · [0-9a-f]{8} · tiny"), timeout=PATIENCE)
    receipts.nth(1).click()
    expect(page.locator("#transcript")).to_contain_text("adapter digest: sha256:")
    page.screenshot(path=tmp_path / "chat.png")
    assert (tmp_path / "chat.png").stat().st_size > 10_000


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, an answer rests after a few tokens and goes on when it is stopped: a small model is too quick."""
    opened, step = threading.Event(), EngineCore._step

    def resting(self: EngineCore, slices: Any) -> None:
        for job in self._scheduler.running:
            while len(job.output) >= 8 and not opened.is_set() and not job.cancelled.wait(0.02):
                pass
        step(self, slices)

    monkeypatch.setattr(EngineCore, "_step", resting)
    yield opened
    opened.set()


def test_an_answer_grows_stops_and_is_asked_again(
    serve: Serve, page: "Page", hand: Hand, gate: threading.Event
) -> None:
    page.goto(serve().url)
    hand(page, "#task", "sql@prod")
    page.locator("#chat-side button", has_text="Settings").click()
    length = page.get_by_label("number input for Maximum answer length, tokens").first
    fill_unfolded(length, "400")
    length.press("Enter")
    send(page, "hello")
    answer = page.locator("#transcript .bot.message").first
    expect(answer).to_contain_text("sql@prod is answering", timeout=PATIENCE)
    expect(answer.locator(".md.chatbot").first).not_to_have_text("", timeout=PATIENCE)
    page.locator("#stop").click()
    expect(page.locator(RECEIPTS).first).to_contain_text("stopped", timeout=PATIENCE)
    gate.set()
    length.fill("8")
    length.press("Enter")
    page.locator("#retry").click()
    expect(page.locator(RECEIPTS).first).to_contain_text("tok/s", timeout=PATIENCE)
    expect(page.locator(RECEIPTS)).to_have_count(1)
    page.locator("#clear").click()
    expect(page.locator(RECEIPTS)).to_have_count(0)


def test_what_is_typed_as_a_task_and_is_none_is_answered_by_a_sentence(serve: Serve, page: "Page", hand: Hand) -> None:
    page.goto(serve().url)
    hand(page, "#task", "nobody")
    send(page, "hello")
    expect(page.locator(RECEIPTS).first).to_contain_text("There is no", timeout=PATIENCE)
    expect(page.locator("#send")).to_be_visible()


@pytest.mark.slow
def test_eight_people_at_once_see_their_own_conversation_only(serve: Serve, browser: "Browser", hand: Hand) -> None:
    url, tasks = serve().url, ["sql:1", "sql:2", "event", "odd"] * 2
    contexts = [browser.new_context() for _ in tasks]
    pages = [context.new_page() for context in contexts]
    for number, (page, task) in enumerate(zip(pages, tasks, strict=True)):
        page.goto(url)
        hand(page, "#task", task)
        page.locator("#question textarea").fill(f"I am number {number}")
    for page in pages:
        page.locator("#question textarea").press("Enter")
    for number, (page, task) in enumerate(zip(pages, tasks, strict=True)):
        expect(page.locator(RECEIPTS)).to_contain_text([re.compile(rf"^\s*{task} · .* tok/s")], timeout=PATIENCE)
        expect(page.locator("#transcript .user.message")).to_have_text([f"I am number {number}"])
    for context in contexts:
        context.close()


def test_cards_number_keys_and_commands_switch(serve: Serve, page: "Page") -> None:
    """Cards are in the order of the keys: the base, then adapters by name; a command may bring its question along."""
    page.goto(serve().url)
    cards = page.locator("#task-cards button")
    expect(cards).to_have_count(4, timeout=PATIENCE)
    expect(cards.nth(0)).to_have_attribute("aria-pressed", "true")
    cards.filter(has_text="calendar event").click()
    about = page.locator("#task-about")
    expect(about).to_contain_text("A sentence to a calendar event", timeout=PATIENCE)
    expect(cards.filter(has_text="calendar event")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Alt+4")
    expect(about).to_contain_text("A question to SQL", timeout=PATIENCE)
    page.locator("#wordmark").click()
    page.keyboard.press("1")
    expect(about).to_contain_text("The frozen base model", timeout=PATIENCE)
    page.locator("#question textarea").fill("1 is typed here")
    expect(about).to_contain_text("The frozen base model")
    send(page, "/sql@prod Films of 1999?")
    expect(page.locator(RECEIPTS)).to_contain_text([re.compile(r"sql@prod · .* tok/s")], timeout=PATIENCE)
    expect(page.locator("#transcript .user.message")).to_have_text(["Films of 1999?"])
    send(page, "/event")
    expect(about).to_contain_text("A sentence to a calendar event", timeout=PATIENCE)
    expect(page.locator(RECEIPTS)).to_have_count(1)
    page.locator("#beside").click()
    expect(page.locator(".answer-card:visible .card-heading p")).to_have_text(
        ["base", "sql@prod", "event"], timeout=PATIENCE
    )
    expect(page.locator(".answer-card:visible").nth(2)).to_contain_text("tok/s", timeout=PATIENCE)


def test_a_conversation_is_kept_as_a_file_and_opened_again(serve: Serve, page: "Page", tmp_path: Path) -> None:
    page.goto(serve().url)
    send(page, "größer als 3? {{x}} ${y}")
    expect(page.locator(RECEIPTS)).to_contain_text(["tok/s"], timeout=PATIENCE)
    expect(page.locator("#send")).to_be_visible(timeout=PATIENCE)
    with page.expect_download() as saving:
        page.locator("#save").click()
    saving.value.save_as(tmp_path / "conversation.json")
    assert json.loads((tmp_path / "conversation.json").read_text())[0]["text"] == "größer als 3? {{x}} ${y}"
    (tmp_path / "other.json").write_text('{"messages": []}')
    page.locator("#clear").click()
    expect(page.locator(RECEIPTS)).to_have_count(0, timeout=PATIENCE)
    for file, words in (("other.json", "no conversation of this app"), ("conversation.json", "tok/s")):
        with page.expect_file_chooser() as choosing:
            page.locator("#open").click()
        choosing.value.set_files(tmp_path / file)
        expect(page.locator(RECEIPTS)).to_contain_text([words], timeout=PATIENCE)
    expect(page.locator("#transcript .user.message")).to_have_text(["größer als 3? {{x}} ${y}"])


def test_json_in_an_answer_is_folded_and_unfolded(serve: Serve, page: "Page", tmp_path: Path) -> None:
    turns = [
        {"role": "user", "text": "a film"},
        {"role": "assistant", "text": '{"film": {"title": "Heat"}, "year": 1995}', "by": "event", "notice": "so"},
    ]
    (tmp_path / "film.json").write_text(json.dumps(turns))
    page.goto(serve().url)
    expect(page.locator("#task-cards button")).to_have_count(4, timeout=PATIENCE)
    with page.expect_file_chooser() as choosing:
        page.locator("#open").click()
    choosing.value.set_files(tmp_path / "film.json")
    title = page.locator("#transcript .code", has_text="Heat").get_by_text('"Heat"')
    expect(title).to_be_visible(timeout=PATIENCE)
    page.locator("#transcript .code summary").nth(1).click()
    expect(title).to_be_hidden()
    expect(page.locator("#transcript .code").get_by_text("1995")).to_be_visible()
    page.locator("#transcript .code summary").nth(1).press("Enter")
    expect(title).to_be_visible()


def test_hostile_texts_stay_text(serve: Serve, page: "Page", hand: Hand) -> None:
    elsewhere: list[str] = []
    page.on("request", lambda request: None if "127.0.0.1" in request.url else elsewhere.append(request.url))
    url = serve().url
    page.on("request", lambda request: elsewhere.append(request.url) if ":9/" in request.url else None)
    page.goto(url)
    hand(page, "#task", "odd")
    expect(page.locator("#task-about")).to_contain_text("<script>window.hacked = 1</script>")
    page.locator("#examples button").first.click()
    expect(page.locator("#question textarea")).not_to_have_value("")
    page.locator("#question textarea").press("Enter")
    expect(page.locator(RECEIPTS)).to_contain_text(["tok/s"], timeout=PATIENCE)
    expect(page.locator("#transcript .user.message")).to_contain_text("<img src=x onerror=")
    page.get_by_role("tab", name="Registry").click()
    hand(page, "#registry-version", "odd:1")
    expect(page.locator("#registry-card")).to_contain_text("odd v1", timeout=PATIENCE)
    assert page.evaluate("window.hacked") is None
    assert [address for address in elsewhere if not address.startswith(("data:", "blob:"))] == [], json.dumps(elsewhere)
