"""How soon is the page there, and how soon does it show a task that was switched to? In headless Chromium, on loopback.

    python -m scripts.bench.serve.app_page --base smollm2-135m --rounds 7

The first adapter of the registry is switched to and back. First paint and first contentful paint are the browser's own
(Paint Timing); a page is usable once the message box is there. A switch runs from picking the task to the page telling
about it.
"""

import argparse
import shutil
import statistics
import time
from typing import Any

from adapterhub_app import launch
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from scripts.bench.report import write_result

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PAINT = "() => Object.fromEntries(performance.getEntriesByType('paint').map(entry => [entry.name, entry.startTime]))"


def measure_paint(browser: Any, url: str) -> dict[str, float]:
    """Open the page as a new person: seconds to first paint, first contentful paint and the message box."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    started = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector("#question textarea")
    usable = time.perf_counter() - started
    paint = page.evaluate(PAINT)
    context.close()
    return {
        "first_paint": paint["first-paint"] / 1000,
        "first_contentful_paint": paint["first-contentful-paint"] / 1000,
        "usable": usable,
    }


def measure_switches(browser: Any, url: str, adapter: str, rounds: int) -> list[float]:
    """Switch between the base and `adapter`; seconds from each pick to the page telling about it."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.goto(url)
    field = page.locator("#task input")
    seconds = []
    for number in range(2 * rounds):
        words, told = (adapter, adapter + ":") if number % 2 == 0 else ("base", "frozen base model")
        field.click()
        field.fill(words)
        started = time.perf_counter()
        field.press("Enter")
        page.wait_for_function(
            "words => document.querySelector('#task-about').innerText.includes(words)", arg=told, polling=5
        )
        seconds.append(time.perf_counter() - started)
    context.close()
    return seconds


def measure_engine(engine: InferenceEngine, adapter: str, rounds: int) -> dict[str, float]:
    """Ask base and adapter in turn; the median switch and time to first token, in seconds."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    results = [
        engine.generate(GenerationRequest(messages=messages, adapter=name, max_new_tokens=8)).timings
        for name in [adapter, None] * rounds
    ]
    return {
        "switch_resident": statistics.median(timing.switch_seconds for timing in results[2::2]),
        "first_token": statistics.median(timing.first_token_seconds for timing in results),
    }


def main() -> None:
    """Measure and write results/app.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    from playwright.sync_api import sync_playwright

    registry = AdapterRegistry()
    adapter = registry.list()[0].name
    base = resolve_base(chosen.base)
    with InferenceEngine.from_base(chosen.base, registry=registry) as engine:
        running = launch(engine, registry, port=0, base_name=base.name, base=base, block=False)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            version = browser.version
            paints = [measure_paint(browser, running.url) for _ in range(chosen.rounds)]
            switches = measure_switches(browser, running.url, adapter, chosen.rounds)
            browser.close()
        inside = measure_engine(engine, adapter, chosen.rounds)
        running.close()
    payload = {
        "browser": version,
        "rounds": chosen.rounds,
        "page_seconds_median": {key: statistics.median(paint[key] for paint in paints) for key in paints[0]},
        "page_seconds_worst": {key: max(paint[key] for paint in paints) for key in paints[0]},
        "task_switch_visible_seconds": {"median": statistics.median(switches), "worst": max(switches)},
        "engine_seconds": inside,
    }
    print(write_result("app", payload))
    print(payload)


if __name__ == "__main__":
    main()
