"""How soon is the page there, how soon does it show a task that was switched to, and what does a training run cost it?

    python -m scripts.bench.serve.app_page --base smollm2-135m --rounds 7

In headless Chromium, on loopback, over the registry of $ADAPTERHUB_HOME, whose first adapter is switched to and back.
First paint and first contentful paint are the browser's own (Paint Timing); a page is usable once the message box is
there. Beside it stands a page of Gradio with one text box and nothing else: what no app of Gradio's can be without. A
switch runs in the page, from the press of a card to the first picture with the card pressed, and to the first that tells
what the task is. The run trains the SQL example in a home of its own, while the engine answers one request after another.
"""

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from adapterhub_app import training
from adapterhub_app.backend import Backend
from adapterhub_app.launch import free_port, launch
from adapterhub_app.theme import build_theme
from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.runs.folder import find_run
from adapterhub_lite.runs.starting import stop
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from scripts.bench.report import write_result

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PAINTED = "() => performance.getEntriesByType('paint').length >= 2"
PAINT = "() => Object.fromEntries(performance.getEntriesByType('paint').map(entry => [entry.name, entry.startTime]))"
LOADED = """() => {
  const all = [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
  return [all.length, all.reduce((sum, one) => sum + one.transferSize, 0)]
}"""
# Presses a card; gives the milliseconds to the first picture with the card pressed, and to the one that tells of the task.
SWITCH = """([task, told]) => new Promise((resolve, reject) => {
  const card = () => document.querySelector(`#task-cards button[data-task="${task}"]`)
  const about = document.querySelector("#task-about")
  const began = performance.now()
  let pressed = null
  const look = () => {
    const passed = performance.now() - began
    if (pressed === null && card()?.getAttribute("aria-pressed") === "true") pressed = passed
    if (about.innerText.includes(told)) return resolve([pressed ?? passed, passed])
    passed > 30000 ? reject(new Error(`The page did not tell of ${task}.`)) : requestAnimationFrame(look)
  }
  card().click()
  requestAnimationFrame(look)
})"""
# Presses a card until the page's scripts answer to it. Not once the network is idle: a page of Gradio's never lets go of it.
ANSWERS = """task => {
  const card = document.querySelector(`#task-cards button[data-task="${task}"]`)
  card?.click()
  return card?.getAttribute("aria-pressed") === "true"
}"""
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER_TOKENS = 48
# The example has 1,081 different questions, and a step takes 8.
STEPS, PATIENCE_SECONDS = 128, 300.0


def measure_paint(browser: Any, url: str) -> dict[str, float]:
    """Open the page as a new person: seconds to first paint, first contentful paint and the message box; what was loaded."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    started = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector("#question textarea")
    usable = time.perf_counter() - started
    page.wait_for_function(PAINTED)
    paint, (files, size) = page.evaluate(PAINT), page.evaluate(LOADED)
    context.close()
    return {
        "first_paint": paint["first-paint"] / 1000,
        "first_contentful_paint": paint["first-contentful-paint"] / 1000,
        "usable": usable,
        "files": files,
        "bytes": size,
    }


def measure_paints(browser: Any, url: str, rounds: int) -> dict[str, dict[str, float]]:
    """Open the page so many times; median and worst of each figure. The first, which warms the server, does not count."""
    measure_paint(browser, url)
    paints = [measure_paint(browser, url) for _ in range(rounds)]
    return {
        name: {key: take(paint[key] for paint in paints) for key in paints[0]}
        for name, take in (("median", statistics.median), ("worst", max))
    }


def measure_empty(browser: Any, rounds: int) -> dict[str, dict[str, float]]:
    """The same of a page with one text box, in the app's theme: Gradio's own waits for fonts from elsewhere."""

    async def start() -> gr.Blocks:
        with gr.Blocks(analytics_enabled=False) as page:
            gr.Textbox(label="Nothing else", elem_id="question", lines=2)
        page.launch(
            server_name="127.0.0.1", server_port=free_port("127.0.0.1", 0), quiet=True, prevent_thread_lock=True,
            ssr_mode=False, share=False, theme=build_theme(),
        )  # fmt: skip
        return page

    # As in `launch`, and because Playwright's loop runs in this thread.
    with ThreadPoolExecutor(1) as starter:
        empty = starter.submit(asyncio.run, start()).result()
    found = measure_paints(browser, empty.local_url, rounds)
    empty.close(verbose=False)
    return found


def measure_switches(browser: Any, url: str, adapter: str, rounds: int) -> dict[str, dict[str, float]]:
    """Press the card of `adapter` and that of the base in turn; seconds until the card is seen pressed, and the task told."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(f"#task-cards button[data-task='{adapter}']")
    page.wait_for_function(ANSWERS, arg=adapter, polling=200)
    both = [(adapter, adapter + ":"), ("(base)", "frozen base model")]
    taken = [page.evaluate(SWITCH, both[number % 2]) for number in range(2 * rounds + 2)][2:]
    context.close()
    columns = {"card": [one[0] / 1000 for one in taken], "told": [one[1] / 1000 for one in taken]}
    return {name: {"median": statistics.median(column), "worst": max(column)} for name, column in columns.items()}


def measure_engine(engine: InferenceEngine, adapter: str, rounds: int) -> dict[str, float]:
    """Ask base and adapter in turn; the median switch and time to first token, in seconds."""
    results = [
        engine.generate(GenerationRequest(messages=MESSAGES, adapter=name, max_new_tokens=8)).timings
        for name in [adapter, None] * rounds
    ]
    return {
        "switch_resident": statistics.median(timing.switch_seconds for timing in results[2::2]),
        "first_token": statistics.median(timing.first_token_seconds for timing in results),
    }


def measure_while_training(
    engine: InferenceEngine, base: ResolvedBase, adapter: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Median tokens per second and seconds to the first token, of one request at a time: before, and while a run trains."""

    def answers() -> dict[str, float]:
        asked = GenerationRequest(messages=MESSAGES, adapter=adapter, max_new_tokens=ANSWER_TOKENS, ignore_eos=True)
        timings = [engine.generate(asked).timings for _ in range(rounds)]
        return {
            "tokens_per_second": statistics.median(timing.tokens_per_second for timing in timings),
            "first_token": statistics.median(timing.first_token_seconds for timing in timings),
        }

    answers()
    alone = answers()
    with tempfile.TemporaryDirectory() as folder:
        # By its folder, or a base that comes with this project would be fetched anew for the new home.
        backend = Backend(engine, AdapterRegistry(folder), base.name, base=replace(base, name=str(base.folder)))
        recipe = training.recipe_of({"steps": STEPS, "batch_size": 8, "validation_split": 0.0, "save_steps": 0.5})
        run = training.start_run(
            backend, None, "sql", training.look_at(backend, training.Source(task="sql"), recipe), recipe
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (run := find_run(run.name, folder)).state.step < 2:
            if time.monotonic() > deadline or not run.is_under_way:
                raise SystemExit(f"The run did not begin to train: {run.stage}, {run.state.problem}.")
            time.sleep(0.1)
        first, began = run.state.step, time.monotonic()
        during = answers()
        run = find_run(run.name, folder)
        seconds_a_step = (time.monotonic() - began) / max(1, run.state.step - first)
        if run.stage != "training":
            raise SystemExit(f"The run was over before the answers were: {run.stage}. Give it more steps.")
        stop(run)
        while find_run(run.name, folder).is_under_way:
            time.sleep(0.1)
    ratio = during["tokens_per_second"] / alone["tokens_per_second"]
    return {"alone": alone, "training": {**during, "seconds_a_step": seconds_a_step}, "kept": {"share": ratio}}


def main() -> None:
    """Measure and write results/app.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--into", type=Path, default=None, help="another folder for the result")
    chosen = parser.parse_args()
    from playwright.sync_api import sync_playwright

    registry = AdapterRegistry()
    adapter = registry.list()[0].name
    base = resolve_base(chosen.base)
    with InferenceEngine.from_base(chosen.base, registry=registry) as engine:
        running = launch(engine, registry, port=0, base_name=base.name, base=base, block=False)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            payload = {
                "browser": browser.version,
                "gradio": gr.__version__,
                "rounds": chosen.rounds,
                "page": measure_paints(browser, running.url, chosen.rounds),
                "empty_page": measure_empty(browser, chosen.rounds),
                "switch_seconds": measure_switches(browser, running.url, adapter, chosen.rounds),
            }
            browser.close()
        running.close()
        payload["engine_seconds"] = measure_engine(engine, adapter, chosen.rounds)
        payload["serving"] = measure_while_training(engine, base, adapter, chosen.rounds)
    print(write_result("app", payload, **({"folder": chosen.into} if chosen.into else {})))
    print(payload)


if __name__ == "__main__":
    main()
