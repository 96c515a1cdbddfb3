"""A page that has just been opened is used at once: what the server says late, to what the page asked at its opening, undoes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect

from adapterhub_app.launch import RunningApp
from tests.app.world import Serve

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

PATIENCE = 30_000
RECEIPTS = "#transcript .thought-group .title"
SETTLED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


class HeldOpening:
    """Holds back what a page asks its server at its opening, until `release`."""

    def __init__(self, page: "Page", app: RunningApp) -> None:
        self._page = page
        found: list[dict[str, Any]] = app.demo.config["dependencies"]
        asked = [one for one in found if any(event == "load" for _, event in one["targets"]) and one["backend_fn"]]
        self._opening = {one["id"] for one in asked}
        self._held: list[Route] = []
        self._released = False
        self._answered = 0
        page.route("**/gradio_api/**", self._take)
        page.on("requestfinished", self._count)

    def _take(self, route: "Route") -> None:
        if self._number(route.request) in self._opening and not self._released:
            self._held.append(route)
        else:
            route.continue_()

    def _count(self, request: Any) -> None:
        self._answered += self._number(request) in self._opening

    def _number(self, request: Any) -> object:
        return request.post_data_json.get("fn_index") if request.method == "POST" else None

    def wait(self) -> None:
        """Wait until the page has asked everything."""
        while len(self._held) < len(self._opening):
            self._page.wait_for_timeout(20)

    def release(self) -> None:
        """Let the server answer, and wait until the page has drawn the answers."""
        self._released = True
        for route in self._held:
            route.continue_()
        while self._answered < len(self._opening):
            self._page.wait_for_timeout(20)
        self._page.evaluate(SETTLED)


def test_a_file_a_task_and_a_search_stay(serve: Serve, page: "Page", tmp_path: Path) -> None:
    turns = [{"role": "user", "text": "a film"}, {"role": "assistant", "text": "Heat", "by": "event", "notice": "so"}]
    (tmp_path / "film.json").write_text(json.dumps(turns))
    app = serve()
    held = HeldOpening(page, app)
    page.goto(app.url)
    held.wait()
    page.get_by_role("tab", name="Registry").click()
    page.locator("#registry-search textarea, #registry-search input").first.fill("calendar")
    page.get_by_role("tab", name="Chat").click()
    page.locator("#task-cards button[data-task=event]").click()
    with page.expect_file_chooser() as choosing:
        page.locator("#open").click()
    choosing.value.set_files(tmp_path / "film.json")
    answer, card = page.locator("#transcript .bot.message").first, page.locator("#task-cards button[data-task=event]")
    expect(answer).to_contain_text("Heat", timeout=PATIENCE)
    held.release()
    expect(page.locator("#task-about")).to_contain_text("calendar event", timeout=PATIENCE)
    expect(card).to_have_attribute("aria-pressed", "true")
    expect(answer).to_contain_text("Heat")
    expect(page.locator("#task input")).to_have_value("event · v1")
    page.get_by_role("tab", name="Registry").click()
    rows = page.locator("#registry-table tbody tr")
    expect(rows.filter(has_text="event")).to_have_count(1, timeout=PATIENCE)
    expect(rows.filter(has_text="sql")).to_have_count(0)


def test_the_conversation_of_before_comes_back_unless_one_has_begun(serve: Serve, page: "Page") -> None:
    app = serve()
    page.goto(app.url)
    ask(page, "first")
    page.reload()
    expect(page.locator(RECEIPTS)).to_contain_text(["tok/s"], timeout=PATIENCE)
    held = HeldOpening(page, app)
    page.reload()
    held.wait()
    ask(page, "second")
    held.release()
    expect(page.locator("#transcript .user.message")).to_have_text(["second"])


def test_of_two_clicks_in_a_row_the_last_one_counts(serve: Serve, page: "Page") -> None:
    """The second comes while the server has not answered what the first one asked."""
    app = serve()
    opening = HeldOpening(page, app)
    page.goto(app.url)
    opening.wait()
    opening.release()
    held: list[Route] = []
    hold: Callable[[Route], None] = lambda route: held.append(route)  # noqa: E731 - the same one is taken away again
    page.route("**/gradio_api/**", hold)
    page.locator("#task-cards button[data-task=event]").click()
    while not held:
        page.wait_for_timeout(20)
    page.locator("#task-cards button[data-task=sql]").click()
    page.unroute("**/gradio_api/**", hold)
    for route in held:
        route.continue_()
    expect(page.locator("#task-about")).to_contain_text("A question to SQL", timeout=PATIENCE)
    expect(page.locator("#task input")).to_have_value("sql · v2")
    expect(page.locator("#task-cards button[data-task=sql]")).to_have_attribute("aria-pressed", "true")


def ask(page: "Page", text: str) -> None:
    """Send a question and wait for the whole answer."""
    page.locator("#question textarea").fill(text)
    page.locator("#question textarea").press("Enter")
    expect(page.locator(RECEIPTS)).to_contain_text(["tok/s"], timeout=PATIENCE)
