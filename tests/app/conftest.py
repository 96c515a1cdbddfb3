"""A small world for the app: a tiny base, adapters in a real registry, a real engine, a served page, Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from adapterhub_app.launch import RunningApp, launch
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from tests.app.world import Hand, Serve, World
from tests.fixture_types import MakeAdapter
from tests.step_gate import StepGate

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> ![x](http://127.0.0.1:9/x.png)"
# Without these Chromium looks for its maker's servers at every start.
BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_base: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for a whole file of tests; tests that write use names of their own."""
    home = tmp_path_factory.mktemp("app-home")
    registry = AdapterRegistry(home)
    base = resolve_base(tiny_base)
    folders = [make_adapter(seed=seed) for seed in range(4)]
    about: list[tuple[str, dict[str, Any]]] = [
        ("sql", {"task": "A question to SQL", "examples": ["Films of 1999?", "Who ordered twice?"]}),
        ("sql", {"task": "A question to SQL", "examples": ["Films of 1999?", "Who ordered twice?"]}),
        (
            "event",
            {"task": "A sentence to a calendar event", "examples": ["Lunch with Ana on Friday"], "tags": ["json"]},
        ),
        ("odd", {"task": HOSTILE, "examples": [HOSTILE], "tags": [HOSTILE[:60]]}),
    ]
    metric = {"metric": "exact match", "adapter_value": 0.87, "base_value": 0.02, "data": "held-out rows"}
    for folder, (name, more) in zip(folders, about, strict=True):
        registry.add(folder, name, base=base, evaluation=[metric], **more)
    registry.set_alias("sql", "prod", version=1)
    with InferenceEngine.from_base(tiny_base, registry=registry) as engine:
        yield World(home, registry, engine, base)


@pytest.fixture(scope="session")
def hostile_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with twelve more tokens that are markup, and a head that nearly always picks one of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("hostile-base")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base)
    first, room = len(tokenizer), model.config.vocab_size
    tokenizer.add_tokens([f"{HOSTILE}<i id='t{number}'>" for number in range(first, room)])
    with torch.no_grad():
        model.get_input_embeddings().weight[first:] *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def gate(world: World) -> Iterator[StepGate]:
    """The engine takes 20 steps, then waits for leave: answers of more tokens than that have begun and not ended."""
    gate = StepGate(world.engine)
    gate.allow(20)
    yield gate
    gate.remove()


@pytest.fixture
def serve(world: World) -> Iterator[Serve]:
    """A function that serves the world's app on a free port; whatever it served is closed after the test."""
    started: list[RunningApp] = []

    def start(**options: Any) -> RunningApp:
        started.append(
            launch(world.engine, world.registry, port=0, base_name="tiny", base=world.base, block=False, **options)
        )
        return started[-1]

    yield start
    for running in started:
        running.close()


def pick(page: "Page", place: str, words: str) -> None:
    """Pick in the drop-down list `place` by the keyboard, as a person would."""
    field = page.locator(f"{place} input").first
    field.click()
    field.fill(words)
    field.press("Enter")


@pytest.fixture
def hand() -> Hand:
    """The gestures that several tests make."""
    return pick


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    """A new page of a new person, 1280 pixels wide; fails the test when a script of the page failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    yield opened
    context.close()
    assert not faults


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Headless Chromium, the one of this machine."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    # What is not there yet on a busy machine comes later; five seconds, as it is by itself, may pass without a glimpse.
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=BROWSER_FLAGS)
        yield chromium
        chromium.close()
