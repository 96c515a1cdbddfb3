"""Retakes the pictures of the app in docs/images: every tab, 1280 and 390 pixels wide, light and dark.

    python -m scripts.pictures [--only chat,plan] [--into docs/images]

It drives the app as it is in headless Chromium, over the registry that `scripts/quickstart.sh` leaves, so the answers and
receipts on the pictures are real ones; docs/images/pictures.json says what they show (see `scripts.picture_sources`). It
wants a second `sql` and a merge as well:

    adapterhub-lite train sql --task sql --steps 8 --seed 1 --validation-split 0.1 --save-steps 4 && adapterhub-lite eval sql --task sql
    adapterhub-lite merge sql:1 event --name both
    adapterhub-lite train sql-r2 --task sql --steps 8 --rank 2 --validation-split 0.1 --save-steps 4 --no-add
"""

import argparse
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from adapterhub_app.launch import launch
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from scripts.picture_sources import agree

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
HEIGHTS = {1280: 800, 390: 844}
PATIENCE = 120_000
SQL = "List the 6 employees with the highest salary."
EVENT = "Workshop with Grace on Friday at 12:15 pm"


def pick(page: Any, place: str, words: str) -> None:
    """Pick in a drop-down list by the keyboard."""
    field = page.locator(f"{place} input").first
    field.click()
    field.fill(words)
    field.press("Enter")
    field.press("Escape")


def ask(page: Any, task: str, text: str, answers: int) -> None:
    """Ask a task in the Chat tab and wait until so many answers stand there complete."""
    pick(page, "#task", task)
    page.locator("#question textarea").fill(text)
    page.locator("#question textarea").press("Enter")
    page.locator("#transcript .thought-group .title", has_text="tok/s").nth(answers - 1).wait_for(timeout=PATIENCE)


def chat(page: Any) -> None:
    """The same question to the base and to `sql@prod`, then another to `event`."""
    ask(page, "base", SQL, 1)
    ask(page, "sql@prod", SQL, 2)
    ask(page, "event", EVENT, 3)


def train(page: Any) -> None:
    """The rows of an example task, as they are learned."""
    page.locator("#train-example label").first.click()
    page.locator("#train-plan", has_text="of memory").wait_for(timeout=PATIENCE)
    page.evaluate("document.querySelector('#run-panel')?.remove()")  # a run of earlier is no part of this


def runs(page: Any) -> None:
    """Two runs laid over each other, and what differs."""
    runs_there = page.locator("#runs-table [role=gridcell]", has_text=re.compile("/[0-9a-f]{12}"))
    runs_there.nth(1).wait_for()
    for run in runs_there.all()[:2]:
        run.click()
        page.wait_for_timeout(800)
    page.locator("#runs-differences", has_text="rank").wait_for(timeout=PATIENCE)


def compare(page: Any) -> None:
    """One question to the base, a task's adapter, a version of it that was trained less, and another task's."""
    for adapter in ("sql@prod", "sql", "event"):
        pick(page, "#compare-adapters", adapter)
    page.locator("#compare-prompt textarea").fill("List the 7 employees with the lowest age.")
    page.locator("#compare-run").click()
    page.locator(".diff-title:visible").nth(2).wait_for(timeout=PATIENCE)


def blend(page: Any) -> None:
    """Both adapters at once, and what to do with them."""
    pick(page, "#blend-adapter-1", "sql@prod")
    pick(page, "#blend-adapter-2", "event")
    page.locator("#blend-prompt textarea").fill(EVENT)
    page.locator("#blend-run").click()
    page.locator("#blend-receipt", has_text="tok/s").wait_for(timeout=PATIENCE)


def registry(page: Any) -> None:
    """A version with all that is kept of it."""
    pick(page, "#registry-version", "sql:1")
    page.locator("#registry-card", has_text="sql v1").wait_for(timeout=PATIENCE)
    page.locator("#registry-loss svg").wait_for(timeout=PATIENCE)


def plan(page: Any) -> None:
    """A base on a device, with the choice explained."""
    page.locator("#plan-run").click()
    page.locator("#plan-answer", has_text="Not chosen").wait_for(timeout=PATIENCE)


TABS: dict[str, Callable[[Any], None]] = {
    "chat": chat,
    "train": train,
    "runs": runs,
    "compare": compare,
    "blend": blend,
    "registry": registry,
    "plan": plan,
}


def photograph(browser: Any, url: str, tab: str, into: Path) -> list[Path]:
    """Prepare one tab, then take it in both widths and appearances; the files are `tab[-dark][-390].png`."""
    written = []
    for width, height in HEIGHTS.items():
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(url)
        page.get_by_role("tab", name=tab.capitalize()).click()
        TABS[tab](page)
        for dark in (False, True):
            if dark:
                page.locator("#appearance").click()
                page.locator("body.dark").wait_for()
            page.mouse.move(0, 0)
            page.evaluate("document.activeElement.blur()")
            page.wait_for_timeout(400)  # what fades into its new colours
            file = into / f"{tab}{'-dark' if dark else ''}{'' if width == 1280 else f'-{width}'}.png"
            page.screenshot(path=file, full_page=width == 390 or tab in ("train", "runs", "registry", "plan"))
            shrink(file)
            written.append(file)
        context.close()
    return written


def shrink(file: Path) -> None:
    """Write a picture in 256 colours, each within a few of 255 values of the true one: a third of the bytes."""
    with Image.open(file) as taken:
        few = taken.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, optimize=True)


def main() -> None:
    """Serve the app, take the pictures, say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--only", default=",".join(TABS), help="tabs, comma separated")
    parser.add_argument("--into", type=Path, default=IMAGES, help="folder of the pictures")
    chosen = parser.parse_args()
    from playwright.sync_api import sync_playwright

    kept, base = AdapterRegistry(), resolve_base(chosen.base)
    chosen.into.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        HubServer(Path(folder)) as hub,
        InferenceEngine.from_base(chosen.base, registry=kept) as engine,
        sync_playwright() as playwright,
    ):
        running = launch(engine, kept, port=0, base_name=base.name, base=base, hub=hub.url, block=False)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for tab in re.split(r"[, ]+", chosen.only):
            for file in photograph(browser, running.url, tab, chosen.into):
                print(file)
            agree([tab], chosen.into)
        browser.close()
        running.close()


if __name__ == "__main__":
    main()
