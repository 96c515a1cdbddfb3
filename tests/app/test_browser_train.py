"""From a CSV to an answer in the chat, on an empty home, without leaving the browser; and what becomes of a run that dies."""

import csv
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from adapterhub_app.launch import RunningApp, launch
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.runs.folder import list_runs
from adapterhub_lite.serving import InferenceEngine
from tests.app.gestures import fill_unfolded
from tests.app.world import Hand

if TYPE_CHECKING:
    from playwright.sync_api import Page

PATIENCE = 180_000
RECEIPTS = "#transcript .thought-group .title"


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A CSV as people have them: umlauts, quotes, emoji, line ends in cells, empty cells, a row of 3,000 words."""
    file = tmp_path / "Straßen (neu).csv"
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["frage", "antwort", "notiz"])
        writer.writerows([f'Wie heißt "{i}"? 🚲', f'Straße {i}; "gut"\nzweite Zeile', ""] for i in range(30))
        writer.writerows([["leer?", "", ""], ["", "ohne Frage", ""], ["lang " * 3000, "kurz", ""]])
    return file


@contextmanager
def app_over(home: Path, tiny_base: Path, hub: str | None = None) -> Iterator[RunningApp]:
    """The app over a home of its own."""
    registry, base = AdapterRegistry(home), resolve_base(tiny_base)
    with InferenceEngine.from_base(tiny_base, registry=registry) as engine:
        running = launch(engine, registry, port=0, base_name="tiny", base=base, hub=hub, block=False)
        yield running
        running.close()


@pytest.fixture
def empty_app(home: Path, tiny_base: Path) -> Iterator[RunningApp]:
    """The app over a home with nothing in it."""
    with app_over(home, tiny_base) as running:
        yield running


def prepare(page: "Page", hand: Hand, url: str, file: Path, steps: int) -> None:
    """Drop the file, map its columns, and set the number of steps."""
    page.goto(url)
    page.get_by_role("tab", name="Train").click()
    page.locator("#train-file input[type=file]").set_input_files(file)
    found = page.locator("#train-found")
    expect(found).to_contain_text("frage, antwort, notiz, do not say what they are", timeout=PATIENCE)
    expect(found).to_contain_text("Name the column")
    hand(page, "#train-prompt-column", "frage")
    hand(page, "#train-completion-column", "antwort")
    expect(found).to_contain_text("31 rows", timeout=PATIENCE)
    page.locator("#train-more button").first.click()
    fill_unfolded(page.locator("#train-max-length input"), "400")
    page.locator("#train-max-length input").press("Tab")
    expect(found).to_contain_text("longer than 400 tokens", timeout=PATIENCE)
    page.locator("#train-steps input").fill(str(steps))
    page.locator("#train-steps input").press("Tab")
    expect(page.locator("#train-steps input")).to_have_value(str(steps))


@pytest.mark.timeout(600)
def test_from_a_messy_file_to_an_answer_in_the_chat(
    empty_app: RunningApp, page: "Page", hand: Hand, messy: Path, home: Path
) -> None:
    prepare(page, hand, empty_app.url, messy, steps=20)
    found = page.locator("#train-found")
    expect(found).to_contain_text("2 rows are left out")
    expect(found).to_contain_text("1 row is longer than 400 tokens")
    expect(found).to_contain_text("line 62: 'antwort' is empty")
    expect(page.locator("#train-preview")).to_contain_text('Straße 0; "gut"')
    expect(page.locator("#train-plan")).to_contain_text("of memory")
    expect(page.locator("#train-name input, #train-name textarea")).to_have_value("strassen-neu")
    hand(page, "#train-memory-preset", "lora-fp32: ")
    expect(page.locator("#train-plan strong")).to_have_text("lora-fp32", timeout=PATIENCE)
    page.locator("#train-run").click()
    card = page.locator("#run-card")
    expect(card).to_be_in_viewport(timeout=PATIENCE)
    expect(card).to_contain_text("of 20 steps", timeout=PATIENCE)
    expect(page.locator("#run-add")).to_be_visible(timeout=PATIENCE)
    expect(card).to_contain_text("predicted")
    expect(page.locator("#run-report")).to_contain_text(re.compile(r"base \d+\.\d+, adapter \d+\.\d+"))
    expect(page.locator("#run-curve svg polyline")).to_have_count(2)
    page.locator("#run-about input, #run-about textarea").first.fill("Nennt Straßen")
    page.locator("#run-add").click()
    expect(page.locator("#task-about")).to_contain_text("Nennt Straßen", timeout=PATIENCE)
    expect(page.locator("#task input")).to_have_value(re.compile("strassen-neu"))
    page.wait_for_function("scrollY === 0")
    page.locator("#question textarea").fill('Wie heißt "3"? 🚲')
    page.locator("#question textarea").press("Enter")
    expect(page.locator(RECEIPTS).first).to_contain_text(re.compile(r"strassen-neu · .*tok/s"), timeout=PATIENCE)
    (run,) = list_runs(home)
    assert run.stage == "finished" and run.state.reference == "strassen-neu:1"
    assert set(run.state.took) >= {"preparing", "training", "reporting"}
    assert [step for step, _ in run.curve()] == list(range(1, 21))
    manifest = AdapterRegistry(home).resolve("strassen-neu")
    assert {one.metric for one in manifest.evaluation} == {"exact_match", "loss"}
    assert manifest.training is not None and manifest.training.steps == 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_messy_file_to_another_home(
    page: "Page", hand: Hand, messy: Path, home: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Two versions are trained and added, laid side by side, promoted and rolled back; another home pulls one and asks it."""
    with HubServer(tmp_path / "hub") as hub, app_over(home, tiny_base, hub.url) as app:
        prepare(page, hand, app.url, messy, steps=20)
        train_and_add(page, "Nennt Straßen", "version 1")
        ask(page, 1)
        page.locator("#beside").click()
        expect(page.locator(".answer-card:visible .card-heading p")).to_have_text(
            ["base", "strassen-neu"], timeout=PATIENCE
        )
        expect(page.locator(".answer-card:visible").nth(1)).to_contain_text("tok/s", timeout=PATIENCE)
        change(page, hand, "Promote", "strassen-neu:1", "strassen-neu@prod is new and is now at version 1")
        page.get_by_role("tab", name="Train").click()
        page.locator("#train-steps input").fill("21")
        page.locator("#train-steps input").press("Tab")
        train_and_add(page, "Nennt Straßen besser", "version 2")
        change(page, hand, "Promote", "strassen-neu:2", "was at version 1 and is now at version 2")
        change(page, hand, "Roll back", "strassen-neu:2", "strassen-neu@prod is back at version 1")
        assert AdapterRegistry(home).aliases("strassen-neu") == {"prod": 1}
        page.locator("#registry-push-repo input, #registry-push-repo textarea").fill("me/strassen")
        page.locator("#registry-push").click()
        expect(page.locator("#registry-steps")).to_contain_text("Published: me/strassen v2", timeout=PATIENCE)
        second = tmp_path / "second-home"
        with app_over(second, tiny_base, hub.url) as other:
            page.goto(other.url)
            page.locator("#first-pull").click()
            page.locator("#registry-changes button").first.click()
            fill_unfolded(page.locator("#registry-pull-repo input, #registry-pull-repo textarea"), "me/strassen")
            page.locator("#registry-pull").click()
            expect(page.locator("#registry-steps")).to_contain_text(
                re.compile(r"strassen:1 .* fetched and verified"), timeout=PATIENCE
            )
            hand(page, "#registry-version", "strassen:1")
            page.locator("#registry-chat").click()
            expect(page.locator("#task-about")).to_contain_text("Nennt Straßen besser", timeout=PATIENCE)
            ask(page, 1, "strassen")
        pulled, published = AdapterRegistry(second), AdapterRegistry(home)
        assert pulled.resolve("strassen").digest == published.resolve("strassen-neu:2").digest


def train_and_add(page: "Page", about: str, version: str) -> None:
    """Press Train, wait for the end, say what it does, add it and see that the chat is switched to it."""
    page.locator("#train-run").click()
    expect(page.locator("#run-add")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#run-report")).to_be_visible(timeout=PATIENCE)
    page.locator("#run-about input, #run-about textarea").first.fill(about)
    page.locator("#run-add").click()
    expect(page.locator("#task-about")).to_contain_text(about, timeout=PATIENCE)
    expect(page.locator("#task-cards button", has_text=version)).to_have_attribute(
        "aria-pressed", "true", timeout=PATIENCE
    )


def ask(page: "Page", number: int, task: str = "strassen-neu") -> None:
    """Ask what the rows taught, and wait for the answer's receipt."""
    page.locator("#question textarea").fill('Wie heißt "3"? 🚲')
    page.locator("#question textarea").press("Enter")
    receipts = page.locator(RECEIPTS)
    expect(receipts).to_have_count(number, timeout=PATIENCE)
    expect(receipts.last).to_contain_text(re.compile(task + r".* · .*tok/s"), timeout=PATIENCE)


def change(page: "Page", hand: Hand, button: str, version: str, words: str) -> None:
    """Promote a version or roll it back in the Registry tab."""
    page.get_by_role("tab", name="Registry").click()
    if not page.locator("#registry-promote").is_visible():
        page.locator("#registry-changes button").first.click()
    hand(page, "#registry-version", version)
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator("#registry-steps")).to_contain_text(words, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_another_base_is_added_and_not_switched_to(
    page: "Page", hand: Hand, messy: Path, home: Path, tiny_base: Path
) -> None:
    """The base is picked by name; the page says that its engine serves another one, and how to chat with what was learned."""
    other = shutil.copytree(tiny_base, home / "bases" / "smollm2-135m", ignore=shutil.ignore_patterns(".*"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with app_over(home, tiny_base) as app:
        prepare(page, hand, app.url, messy, steps=2)
        expect(page.locator("#train-base input")).to_have_value("tiny")
        hand(page, "#train-base", "smollm2-135m")
        page.locator("#train-run").click()
        expect(page.locator("#run-elsewhere")).to_contain_text("the engine of this page serves tiny", timeout=PATIENCE)
        expect(page.locator("#run-elsewhere")).to_contain_text("adapterhub-lite demo --base smollm2-135m")
        expect(page.locator("#run-add")).to_have_text("Add to the registry", timeout=PATIENCE)
        expect(page.locator("#run-add")).to_be_visible(timeout=PATIENCE)
        page.locator("#run-add").click()
        expect(page.locator("#run-card")).to_contain_text("added as strassen-neu:1", timeout=PATIENCE)
        expect(page.locator("#run-use")).to_be_hidden()
        expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
        page.get_by_role("tab", name="Chat").click()
        expect(page.locator("#task-cards button")).to_have_count(1, timeout=PATIENCE)
    assert AdapterRegistry(home).resolve("strassen-neu").base.fingerprint == resolve_base(other).fingerprint


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_goes_on_from_the_page(
    empty_app: RunningApp, page: "Page", hand: Hand, messy: Path, home: Path
) -> None:
    """SIGKILL to the training process in its middle, a new page, Resume; then Stop keeps what there is."""
    import os
    import signal

    prepare(page, hand, empty_app.url, messy, steps=4000)
    page.locator("#train-save-steps input").fill("5")
    page.locator("#train-run").click()
    card = page.locator("#run-card")
    expect(card).to_contain_text(re.compile(r"[1-9]\d* of 4000 steps"), timeout=PATIENCE)
    expect(page.locator("#run-samples")).to_be_visible(timeout=PATIENCE)
    (run,) = list_runs(home)
    os.kill(run.state.pid, signal.SIGKILL)
    expect(card).to_contain_text("interrupted", timeout=PATIENCE)
    (run,) = list_runs(home)
    before = run.state.step
    # As after a restart of the browser: a page that knows nothing.
    page.goto(empty_app.url)
    page.get_by_role("tab", name="Train").click()
    expect(card).to_contain_text("interrupted", timeout=PATIENCE)
    page.locator("#run-resume").click()
    expect(card).to_contain_text(re.compile("[0-9a-f]{12} trains"), timeout=PATIENCE)
    page.locator("#run-stop").click()
    expect(card).to_contain_text("stopped; what it has learned is saved", timeout=PATIENCE)
    (run,) = list_runs(home)
    assert run.stage == "stopped" and run.state.step >= before - 5 and run.adapter is not None
    page.locator("#run-add").click()
    expect(page.locator("#task input")).to_have_value(re.compile("strassen-neu"), timeout=PATIENCE)
