"""What goes wrong on a busy page: eight streams at once, a restart in an answer's middle, hostile answers, no mouse."""

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from adapterhub_app.display.transcript import INTERRUPTED
from adapterhub_app.launch import launch
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from tests.app.world import Hand, Serve, World, in_the_engine, until
from tests.checkout import ROOT
from tests.step_gate import StepGate

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 30_000
RECEIPTS = "#transcript .thought-group .title"
ANSWER = "#transcript .bot.message .md.chatbot"


def send(page: "Page", text: str) -> None:
    """Write a message and send it by Enter."""
    field = page.locator("#question textarea")
    field.fill(text)
    field.press("Enter")


def until_kept(page: "Page", of_answer: str) -> None:
    """Wait until the browser's tab holds the last answer's text or receipt, which it does a moment after it is shown."""
    turns = 'JSON.parse(sessionStorage.getItem("conversation") ?? "[[]]")[0]'
    page.wait_for_function(f"{turns}.at(-1)?.{of_answer}", timeout=PATIENCE)


@pytest.mark.slow
def test_eight_answers_grow_side_by_side(
    world: World, serve: Serve, browser: "Browser", hand: Hand, request: pytest.FixtureRequest
) -> None:
    """All eight people read the beginning of their answer while none of the eight is complete."""
    gate = StepGate(world.engine)
    request.addfinalizer(gate.remove)
    url, contexts = serve().url, [browser.new_context() for _ in range(8)]
    pages = [context.new_page() for context in contexts]
    for page, task in zip(pages, ["sql:1", "sql:2", "sql:1", "sql:2"] * 2, strict=True):
        page.goto(url)
        hand(page, "#task", task)
        expect(page.locator("#task-about")).to_contain_text("rank", timeout=PATIENCE)
    for number, page in enumerate(pages, 1):
        send(page, "hello")
        until(lambda number=number: in_the_engine(world.engine) == number)
    gate.allow(14)  # a step gives at most eight tokens: no answer of 128 ends in them
    for page in pages:
        expect(page.locator(RECEIPTS)).to_contain_text(["is answering"], timeout=PATIENCE)
        expect(page.locator(ANSWER).first).not_to_have_text("", timeout=PATIENCE)
    gate.allow(10_000)
    for page in pages:
        expect(page.locator(RECEIPTS)).to_contain_text(["tok/s"], timeout=PATIENCE)
    for context in contexts:
        context.close()


# The page's server, whose engine stands still in the middle of its first answer, however fast the machine is.
HELD = """
import sys
from adapterhub_app.launch import main
from adapterhub_lite.serving import InferenceEngine
from tests.step_gate import StepGate
load = InferenceEngine.from_base
def held(*given, **named):
    engine = load(*given, **named)
    StepGate(engine).allow(10)
    return engine
InferenceEngine.from_base = held
sys.exit(main())
"""


@pytest.mark.slow
def test_the_server_dies_in_the_middle_of_an_answer_and_the_conversation_goes_on(
    world: World, tiny_base: Path, page: "Page", hand: Hand, request: pytest.FixtureRequest
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--base", str(tiny_base), "--home", str(world.home), "--port", str(port)]

    def start(*program: str) -> "subprocess.Popen[str]":
        command = [sys.executable, *program, *options]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        request.addfinalizer(lambda: (server.kill(), server.communicate()))
        assert server.stdout is not None
        assert "adapterhub-lite is at" in server.stdout.readline()
        return server

    first = start("-c", HELD)
    page.goto(f"http://127.0.0.1:{port}/")
    hand(page, "#task", "sql")
    expect(page.locator("#task-about")).to_contain_text("rank", timeout=PATIENCE)
    send(page, "before")
    expect(page.locator(ANSWER).first).not_to_have_text("", timeout=PATIENCE)
    until_kept(page, "text")
    first.kill()
    first.wait()
    start("-m", "adapterhub_app")
    expect(page.locator(RECEIPTS)).to_contain_text([f"sql · {INTERRUPTED}"], timeout=PATIENCE)
    send(page, "after")
    expect(page.locator(RECEIPTS)).to_contain_text([INTERRUPTED, re.compile("sql · .* tok/s")], timeout=PATIENCE)
    expect(page.locator("#transcript .user.message")).to_have_text(["before", "after"])
    until_kept(page, "receipt")
    page.reload()
    expect(page.locator(RECEIPTS)).to_contain_text([INTERRUPTED, "tok/s"], timeout=PATIENCE)
    page.locator("#clear").click()
    expect(page.locator(RECEIPTS)).to_have_count(0, timeout=PATIENCE)
    page.reload()
    expect(page.locator("#task-about")).to_be_attached(timeout=PATIENCE)
    expect(page.locator(RECEIPTS)).to_have_count(0)


def test_answers_that_are_markup_stay_text(page: "Page", hostile_base: Path, home: Path) -> None:
    """A real model that answers with scripts and images, in every place that shows an answer."""
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url) if ":9/" in request.url else None)
    registry = AdapterRegistry(home)
    with InferenceEngine.from_base(hostile_base, registry=registry) as engine:
        running = launch(
            engine, registry, port=0, base_name="<b>hostile</b>", base=resolve_base(hostile_base), block=False
        )
        page.goto(running.url)
        expect(page.locator("#wordmark")).to_contain_text("<b>hostile</b>")
        send(page, "hello")
        expect(page.locator(RECEIPTS)).to_contain_text(["tok/s"], timeout=PATIENCE)
        expect(page.locator(ANSWER).first).to_contain_text("<script>window.hacked = 1</script>")
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-prompt textarea").fill("hello")
        page.locator("#compare-run").click()
        expect(page.locator(".answer-card:visible")).to_contain_text(["tok/s"], timeout=PATIENCE)
        assert page.evaluate("window.hacked") is None and page.locator("[id^=t2]").count() == 0
        assert fetched == []
        running.close()


def test_the_keyboard_alone_is_enough(serve: Serve, page: "Page") -> None:
    """From the message box to another task and another tab, never touching the mouse, and always seeing where one is."""
    page.goto(serve().url)
    expect(page.locator("#question textarea")).to_be_focused(timeout=PATIENCE)
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    expect(page.locator(RECEIPTS)).to_contain_text(["base"], timeout=PATIENCE)
    expect(page.locator("#send")).to_be_visible(timeout=PATIENCE)
    reach(page, "#task input", "Shift+Tab")
    page.keyboard.type("event")
    page.keyboard.press("Enter")
    expect(page.locator("#task-about")).to_contain_text("calendar event", timeout=PATIENCE)
    reach(page, "#examples button", "Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#question textarea")).to_have_value("Lunch with Ana on Friday", timeout=PATIENCE)
    reach(page, "#question textarea", "Tab")
    page.keyboard.press("Enter")
    expect(page.locator(RECEIPTS).nth(1)).to_contain_text(re.compile(r"event · [0-9a-f]{8}"), timeout=PATIENCE)
    reach(page, "[role=tab] >> text=Plan", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#plan-run")).to_be_visible(timeout=PATIENCE)
    reach(page, "#plan-run", "Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#plan-answer")).to_contain_text("Not chosen", timeout=PATIENCE)


def reach(page: "Page", place: str, key: str) -> None:
    """Press `key` until `place` has the focus, as somebody does who cannot point at it."""
    wanted = page.locator(place).first
    for _ in range(80):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not reach {place}")
