"""Makes the moving picture of the switch, docs/images/switch.webp: one question, three tasks, one base.

    python -m scripts.moving_picture [--into docs/images/switch.webp]

It drives the app as it is in headless Chromium, over the registry that `scripts/quickstart.sh` leaves; what it shows are
real answers at their real pace, except that a wait without any change on the page is cut to a second.
"""

import argparse
import io
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from adapterhub_app.launch import launch
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from scripts.picture_sources import FILM, agree
from scripts.pictures import FLAGS, IMAGES, PATIENCE, SQL

WIDTH, HEIGHT = 960, 680
MOST_BYTES = 2_000_000
QUALITIES = (80, 65, 50, 35)
MOST_MILLISECONDS = 1000
LAST_MILLISECONDS = 2500
EVENT = "Workshop with Grace on Friday at 12:15 pm"
RECEIPT = "#transcript .thought-group .title"


@dataclass
class Film:
    """Pictures of a page with how long each stands, in milliseconds; equal ones in a row are one."""

    page: Any
    frames: list[Image.Image] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    _last: bytes = b""
    _at: float = 0.0

    def shoot(self) -> None:
        """Take one picture now."""
        taken = self.page.screenshot(type="png")
        moment = time.monotonic()
        if self.durations:
            self.durations[-1] = min(MOST_MILLISECONDS, self.durations[-1] + int(1000 * (moment - self._at)))
        self._at = moment
        if taken == self._last:
            return
        self._last = taken
        self.frames.append(Image.open(io.BytesIO(taken)).convert("RGB"))
        self.durations.append(1)

    def until(self, true: Callable[[], bool]) -> None:
        """Take pictures until something is so."""
        end = time.monotonic() + PATIENCE / 1000
        while not true():
            if time.monotonic() > end:
                raise SystemExit("The page did not get so far in time.")
            self.shoot()
        self.shoot()

    def rest(self, seconds: float) -> None:
        """Let what stands there be read."""
        self.shoot()
        self.durations[-1] = int(1000 * seconds)
        self._at = time.monotonic()

    def write(self, file: Path) -> int:
        """Write the film as an animated WebP under `MOST_BYTES`; returns its bytes."""
        durations = [max(40, one) for one in self.durations]
        durations[-1] = LAST_MILLISECONDS
        for quality in QUALITIES:
            self.frames[0].save(
                file,
                save_all=True,
                append_images=self.frames[1:],
                duration=durations,
                loop=0,
                quality=quality,
                method=4,
            )
            if file.stat().st_size < MOST_BYTES:
                return file.stat().st_size
        raise SystemExit(
            f"{file} has {file.stat().st_size} bytes at the lowest quality; at most {MOST_BYTES} are wanted."
        )


def ask(film: Film, text: str, answers: int) -> None:
    """Type a question, send it, and film until so many answers are complete."""
    field_ = film.page.locator("#question textarea")
    for start in range(0, len(text), 6):
        field_.fill(text[: start + 6])
        film.shoot()
    field_.press("Enter")
    film.until(lambda: film.page.locator(RECEIPT, has_text="tok/s").count() >= answers)
    film.rest(1.6)


def switch(film: Film, name: str) -> None:
    """Press the card of a task."""
    film.page.locator(f"#task-cards button[data-task='{name}']").click()
    film.until(lambda: film.page.locator(f"#task-cards button[data-task='{name}'][aria-pressed=true]").count() == 1)
    film.rest(0.9)


def play(film: Film) -> None:
    """The same question to the base and to `sql`, another to `event`."""
    film.rest(1.0)
    ask(film, SQL, 1)
    switch(film, "sql@prod" if film.page.locator("[data-task='sql@prod']").count() else "sql")
    ask(film, SQL, 2)
    switch(film, "event")
    ask(film, EVENT, 3)


def main() -> None:
    """Serve the app, film it, say where the film is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--into", type=Path, default=IMAGES / "switch.webp", help="the file to write")
    chosen = parser.parse_args()
    from playwright.sync_api import sync_playwright

    kept, base = AdapterRegistry(), resolve_base(chosen.base)
    with InferenceEngine.from_base(chosen.base, registry=kept) as engine, sync_playwright() as playwright:
        running = launch(engine, kept, port=0, base_name=base.name, base=base, block=False)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.goto(running.url)
        page.locator("#task-cards button").nth(1).wait_for()
        page.locator("#chat-side button", has_text="Settings").click()
        length = page.get_by_label("number input for Maximum answer length, tokens").first
        length.fill("48")
        length.press("Enter")
        page.locator("#chat-side button", has_text="Settings").click()
        page.evaluate("scrollTo(0, 0)")
        film = Film(page)
        play(film)
        size = film.write(chosen.into)
        browser.close()
        running.close()
    agree([FILM], chosen.into.parent)
    print(f"{chosen.into}: {len(film.frames)} pictures, {sum(film.durations) / 1000:.0f} s, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
