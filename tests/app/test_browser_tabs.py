"""Compare, Blend and Registry in a real browser, logins, and every tab at both widths."""

import json
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from adapterhub_lite.hub_server import HubServer
from app.access import Access

PATIENCE = 30_000


def open_tab(page: Any, name: str) -> None:
    """Go to a tab."""
    page.get_by_role("tab", name=name).click()


def test_compare_shows_answers_side_by_side_with_their_differences(serve: Any, page: Any, hand: Any) -> None:
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
    expect(cards.locator(".card-heading p")).to_have_text(["base", "sql@prod", "event"])
    expect(page.locator("#compare-run")).to_be_visible(timeout=PATIENCE)
    expect(cards.nth(2)).to_contain_text(re.compile(r"[0-9a-f]{8} · tiny · \d+ tok/s"))
    expect(page.locator(".difference:visible")).to_have_count(2)


def test_blend_answers_live_goes_to_the_chat_and_is_saved(serve: Any, page: Any, hand: Any, world: Any) -> None:
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
    page.locator("#blend-name input, #blend-name textarea").fill("from-browser")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-saved")).to_contain_text("Saved as from-browser:1", timeout=PATIENCE)
    expect(page.locator("#blend-saved")).to_contain_text("Measured error")
    assert world.registry.resolve("from-browser").parents[0].weight == 0.55
    page.locator("#blend-chat").click()
    expect(page.locator("#task-about")).to_contain_text("Blend of sql:2", timeout=PATIENCE)


def test_registry_searches_shows_promotes_rolls_back_pushes_and_pulls(
    serve: Any, page: Any, hand: Any, world: Any, tmp_path: Path
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
        page.locator("#registry-alias input, #registry-alias textarea").fill("live")
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
        expect(page.locator("#registry-steps")).to_contain_text("sql-again:2", timeout=PATIENCE)
        assert world.registry.resolve("sql-again:2").digest == world.registry.resolve("sql:2").digest


def test_a_viewer_logs_in_asks_and_may_not_promote(
    serve: Any, page: Any, hand: Any, world: Any, tmp_path: Path
) -> None:
    file = tmp_path / "logins.json"
    file.write_text(json.dumps({"bo": {"password": "long enough"}}))
    file.chmod(0o600)
    page.goto(serve(access=Access.read(file)).url)
    page.get_by_label("username").fill("bo")
    page.get_by_label("password").fill("long enough")
    page.get_by_role("button", name="Login").click()
    expect(page.locator("#question textarea")).to_be_visible(timeout=PATIENCE)
    open_tab(page, "Registry")
    hand(page, "#registry-version", "sql:2")
    page.locator("#registry-changes button").first.click()
    page.locator("#registry-promote").click()
    expect(page.locator("#registry-steps")).to_contain_text("only an admin may promote", timeout=PATIENCE)
    assert world.registry.aliases("sql")["prod"] == 1


def test_every_tab_fits_both_widths_light_and_dark(serve: Any, page: Any) -> None:
    page.goto(serve().url)
    for name in ("Chat", "Compare", "Blend", "Registry", "Plan"):
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            open_tab(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is too wide at {width}"
    page.locator("#appearance").click()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))


def test_plan_explains_its_choice_and_draws_every_preset(serve: Any, page: Any) -> None:
    page.goto(serve().url)
    open_tab(page, "Plan")
    page.locator("#plan-run").click()
    expect(page.locator("#plan-answer")).to_contain_text("Not taken", timeout=PATIENCE)
    expect(page.locator("#plan-chart canvas, #plan-chart svg.marks").first).to_be_visible(timeout=PATIENCE)
    page.locator("#plan-base input").fill("/etc")
    page.locator("#plan-base input").press("Enter")
    page.locator("#plan-run").click()
    expect(page.locator("#plan-answer")).to_contain_text("Wanted a base from the list", timeout=PATIENCE)
