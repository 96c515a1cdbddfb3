"""Compare, Blend and Registry in a real browser, logins, and every tab at both widths."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from adapterhub_app.access import Access
from adapterhub_app.tabs.compare import nearest
from adapterhub_lite.hub_server import HubServer
from tests.app.gestures import fill_unfolded
from tests.app.world import Hand, Serve, World

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 30_000
TASKS = ["base", "sql@prod", "event"]


def open_tab(page: "Page", name: str) -> None:
    """Go to a tab."""
    page.get_by_role("tab", name=name).click()


def test_compare_shows_answers_side_by_side_with_their_differences(serve: Serve, page: "Page", hand: Hand) -> None:
    page.goto(serve().url)
    open_tab(page, "Compare")
    page.locator("#compare-run").click()
    expect(page.locator("#compare-notice")).to_contain_text("no prompt yet", timeout=PATIENCE)
    hand(page, "#compare-adapters", "sql@prod")
    hand(page, "#compare-adapters", "event")
    page.locator("#compare-prompt textarea").fill("hello")
    page.locator("#compare-run").click()
    cards = page.locator(".answer-card:visible")
    expect(cards).to_have_count(3, timeout=PATIENCE)
    expect(cards.locator(".card-heading p")).to_have_text(TASKS)
    expect(page.locator("#compare-run")).to_be_visible(timeout=PATIENCE)
    expect(cards.nth(2)).to_contain_text(re.compile(r"[0-9a-f]{8} · tiny · \d+ tok/s"))
    expect(page.locator(".diff-title:visible")).to_have_count(2)
    answers = [cards.nth(place).locator("textarea").input_value() for place in range(3)]
    for place, title in enumerate(page.locator(".diff-title:visible").all_inner_texts(), start=1):
        wanted = nearest(answers[:place], answers[place])
        assert title == (
            "Too different from the other answers to mark words" if wanted is None else f"Against {TASKS[wanted]}"
        )


def test_blend_answers_live_goes_to_the_chat_and_is_saved(serve: Serve, page: "Page", hand: Hand, world: World) -> None:
    page.goto(serve().url)
    open_tab(page, "Blend")
    hand(page, "#blend-adapter-1", "sql")
    hand(page, "#blend-adapter-2", "event")
    page.locator("#blend-prompt textarea").fill("hello")
    page.locator("#blend-run").click()
    receipt = page.locator("#blend-receipt")
    expect(receipt).to_contain_text(re.compile(r"0\.5×sql \+ 0\.5×event · [0-9a-f]{8}\+[0-9a-f]{8}"), timeout=PATIENCE)
    slider = page.locator("#blend-weight-1 input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    expect(receipt).to_contain_text(re.compile(r"0\.55×sql .*tok/s"), timeout=PATIENCE)
    page.locator("#blend-saving button").first.click()
    fill_unfolded(page.locator("#blend-name input, #blend-name textarea"), "from-browser")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-saved")).to_contain_text("Saved as from-browser:1", timeout=PATIENCE)
    expect(page.locator("#blend-saved")).to_contain_text("Measured error")
    assert world.registry.resolve("from-browser").parents[0].weight == 0.55
    page.locator("#blend-chat").click()
    expect(page.locator("#task-about")).to_contain_text("Blend of sql:2", timeout=PATIENCE)


def test_registry_searches_shows_promotes_rolls_back_pushes_and_pulls(
    serve: Serve, page: "Page", hand: Hand, world: World, tmp_path: Path
) -> None:
    with HubServer(tmp_path / "hub") as hub:
        page.goto(serve(hub=hub.url).url)
        open_tab(page, "Registry")
        page.locator("#registry-search textarea, #registry-search input").fill("calendar")
        table = page.locator("#registry-table")
        expect(table.get_by_role("gridcell", name="sql", exact=True)).to_have_count(0, timeout=PATIENCE)
        table.get_by_role("gridcell", name="event", exact=True).click()
        expect(page.locator("#registry-version input")).to_have_value("event:1", timeout=PATIENCE)
        page.locator("#registry-search textarea, #registry-search input").fill("")
        hand(page, "#registry-version", "sql:2")
        expect(page.locator("#registry-provenance")).to_contain_text(
            world.registry.resolve("sql:2").digest, timeout=PATIENCE
        )
        expect(page.locator("#registry-card")).to_contain_text("exact match")
        page.locator("#registry-changes button").first.click()
        fill_unfolded(page.locator("#registry-alias input, #registry-alias textarea"), "live")
        for version, button, words in (
            ("sql:1", "promote", "now at version 1"),
            ("sql:2", "promote", "now at version 2"),
        ):
            hand(page, "#registry-version", version)
            page.locator(f"#registry-{button}").click()
            expect(page.locator("#registry-steps")).to_contain_text(words, timeout=PATIENCE)
        page.locator("#registry-rollback").click()
        expect(page.locator("#registry-steps")).to_contain_text("sql@live is back at version 1", timeout=PATIENCE)
        assert world.registry.aliases("sql")["live"] == 1
        page.locator("#registry-push-repo input, #registry-push-repo textarea").fill("me/sql")
        page.locator("#registry-push").click()
        expect(page.locator("#registry-steps")).to_contain_text("Published: me/sql v2", timeout=PATIENCE)
        page.locator("#registry-pull-repo input, #registry-pull-repo textarea").fill("me/sql")
        page.locator("#registry-pull-name input, #registry-pull-name textarea").fill("sql-again")
        page.locator("#registry-pull").click()
        expect(page.locator("#registry-steps")).to_contain_text("sql-again:1", timeout=PATIENCE)
        assert world.registry.resolve("sql-again:1").digest == world.registry.resolve("sql:2").digest


def log_in(page: "Page", name: str, password: str) -> None:
    """Fill in the login page."""
    page.get_by_label("username").fill(name)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


def test_a_viewer_may_not_write_and_an_admin_may(
    serve: Serve, browser: "Browser", hand: Hand, world: World, tmp_path: Path
) -> None:
    file = tmp_path / "logins.json"
    logins = {"bo": {"password": "long enough"}, "ana": {"password": "longer still", "role": "admin"}}
    file.write_text(json.dumps(logins))
    file.chmod(0o600)
    url = serve(access=Access.read(file)).url
    for name, words, kept in (("bo", "only an admin may promote", None), ("ana", "now at version 2", 2)):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        log_in(page, name, "wrong password")
        expect(page.get_by_text("Incorrect credentials")).to_be_visible(timeout=PATIENCE)
        log_in(page, name, logins[name]["password"])
        expect(page.locator("#question textarea")).to_be_visible(timeout=PATIENCE)
        open_tab(page, "Registry")
        hand(page, "#registry-version", "sql:2")
        page.locator("#registry-changes button").first.click()
        fill_unfolded(page.locator("#registry-alias input, #registry-alias textarea"), "logged-in")
        page.locator("#registry-promote").click()
        expect(page.locator("#registry-steps")).to_contain_text(words, timeout=PATIENCE)
        assert world.registry.aliases("sql").get("logged-in") == kept
        context.close()


def test_the_next_person_at_this_browser_does_not_see_it(serve: Serve, browser: "Browser", tmp_path: Path) -> None:
    """With logins a reload brings the conversation back to who had it, and to nobody else."""
    file = tmp_path / "logins.json"
    file.write_text(json.dumps({n: {"password": f"{n} long enough"} for n in ("ana", "bo")}))
    file.chmod(0o600)
    url = serve(access=Access.read(file)).url
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    log_in(page, "ana", "ana long enough")
    expect(page.locator("#question textarea")).to_be_visible()
    ask_and_wait(page, "mine alone")
    page.reload()
    expect(page.locator("#transcript .user.message")).to_have_text(["mine alone"])
    context.clear_cookies()
    page.goto(url)
    log_in(page, "bo", "bo long enough")
    expect(page.locator("#question textarea")).to_be_visible()
    ask_and_wait(page, "bo's own")
    expect(page.locator("#transcript .user.message")).to_have_text(["bo's own"])
    context.close()


def ask_and_wait(page: "Page", text: str) -> None:
    """Send a question and wait for the whole answer."""
    page.locator("#question textarea").fill(text)
    page.locator("#question textarea").press("Enter")
    expect(page.locator("#transcript .thought-group .title")).to_contain_text(["tok/s"], timeout=PATIENCE)


def test_before_anything_happened_the_page_says_what_it_shows(serve: Serve, page: "Page") -> None:
    """Who answers, and how a first run begins; nothing is offered to be picked where there is nothing."""
    page.goto(serve().url)
    expect(page.locator("#task-about")).to_have_text("The frozen base model, no adapter.", timeout=PATIENCE)
    open_tab(page, "Runs")
    expect(page.locator("#runs-empty")).to_contain_text("No runs yet", timeout=PATIENCE)
    expect(page.locator("#runs-picked")).to_be_hidden()


def test_every_tab_fits_both_widths_light_and_dark(serve: Serve, page: "Page") -> None:
    page.goto(serve().url)
    for name in ("Chat", "Train", "Compare", "Blend", "Registry", "Plan"):
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            open_tab(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is too wide at {width}"
    page.locator("#appearance").click()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))


def test_plan_explains_its_choice_and_draws_every_preset(serve: Serve, page: "Page") -> None:
    page.goto(serve().url)
    open_tab(page, "Plan")
    page.locator("#plan-run").click()
    expect(page.locator("#plan-answer")).to_contain_text("Not chosen", timeout=PATIENCE)
    expect(page.locator("#plan-chart .plan-bar").nth(3)).to_be_visible(timeout=PATIENCE)
    chosen = page.locator("#plan-answer h3").first.inner_text()
    expect(page.locator("#plan-chart .plan-bar.chosen span").first).to_have_text(chosen)
    page.locator("#plan-base input").fill("/etc")
    page.locator("#plan-base input").press("Enter")
    page.locator("#plan-run").click()
    expect(page.locator("#plan-answer")).to_contain_text("Expected a base from the list", timeout=PATIENCE)
