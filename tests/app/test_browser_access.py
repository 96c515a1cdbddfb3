"""For everybody: axe finds nothing serious, pages fit from 390 to 2,560 pixels and open at their title, choices are kept."""

import re
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.app.world import Hand, Serve

if TYPE_CHECKING:
    from playwright.sync_api import Page

PATIENCE = 60_000
TABS = ("Chat", "Train", "Runs", "Compare", "Blend", "Registry", "Plan")
# Of each row of fields (those whose frames begin at one height) the heights at which what is typed into begins.
FIELDS = """() => {
  const rows = {}
  for (const [number, form] of document.querySelectorAll("#train-settings .form, #train-more .form").entries())
    for (const block of form.querySelectorAll(":scope > .block")) {
      const field = block.querySelector(".wrap-inner, input[type=number]")
      if (field?.offsetParent) {
        const row = `${number} at ${Math.round(block.getBoundingClientRect().top)}`
        ;(rows[row] ??= []).push(Math.round(field.getBoundingClientRect().bottom))
      }
    }
  return rows
}"""
# What is Gradio's own markup and cannot be changed from here, with the issue it is known under or why.
KNOWN: dict[str, str] = {}


def open_tab(page: "Page", name: str) -> None:
    """Go to a tab, which may stand behind the button for those that do not fit."""
    page.get_by_role("tab", name=name, exact=True).first.click()
    expect(page.get_by_role("tab", name=name, exact=True).first).to_have_attribute("aria-selected", "true")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("appearance", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_tab(serve: Serve, page: "Page", appearance: str) -> None:
    page.emulate_media(reduced_motion="reduce")  # what fades has both colours for a moment
    page.goto(serve().url)
    expect(page.locator("#task-cards button")).to_have_count(4, timeout=PATIENCE)
    if appearance == "dark":
        page.locator("#appearance").click()
        expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
    found: list[str] = []
    for name in TABS:
        open_tab(page, name)
        found += serious(page, name)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_axe_finds_nothing_serious_on_tabs_with_something_on_them(serve: Serve, page: "Page", hand: Hand) -> None:
    """A conversation with an opened receipt, answers side by side, rows to learn, a version in full, a plan."""
    page.emulate_media(reduced_motion="reduce")
    page.goto(serve().url)
    page.locator("#question textarea").fill("hello")
    page.locator("#question textarea").press("Enter")
    receipt = page.locator("#transcript .thought-group .title", has_text="tok/s")
    receipt.click(timeout=PATIENCE)
    expect(page.locator("#transcript .thought-group")).to_contain_text("none: the bare base answered")
    found = serious(page, "Chat")
    open_tab(page, "Compare")
    hand(page, "#compare-adapters", "event")
    page.locator("#compare-prompt textarea").fill("hello")
    page.locator("#compare-run").click()
    expect(page.locator(".diff-title:visible")).to_have_count(1, timeout=PATIENCE)
    found += serious(page, "Compare")
    open_tab(page, "Train")
    page.locator("#train-example label").first.click()
    expect(page.locator("#train-plan")).to_contain_text("of memory", timeout=PATIENCE)
    page.locator("#train-more button").first.click()
    found += serious(page, "Train")
    open_tab(page, "Registry")
    hand(page, "#registry-version", "sql:1")
    expect(page.locator("#registry-card")).to_contain_text("exact match", timeout=PATIENCE)
    page.locator("#registry-changes button").first.click()
    found += serious(page, "Registry")
    open_tab(page, "Plan")
    page.locator("#plan-run").click()
    expect(page.locator("#plan-answer")).to_contain_text("Not chosen", timeout=PATIENCE)
    found += serious(page, "Plan")
    assert not found, "\n".join(found)


def serious(page: "Page", where: str) -> list[str]:
    """What axe calls serious or critical on the page as it stands, one line each."""
    return [
        f"{where}: {described(violation)}"
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical") and violation["id"] not in KNOWN
    ]


def described(violation: dict[str, Any]) -> str:
    """A violation in one line, with the first places."""
    places = "; ".join(node["html"][:160] for node in violation["nodes"][:3])
    return f"{violation['id']} ({violation['help']}): {places}"


@pytest.mark.timeout(300)
def test_every_tab_fits_every_width_and_opens_at_its_title(serve: Serve, page: "Page") -> None:
    page.goto(serve().url)
    expect(page.locator("#task-cards button")).to_have_count(4, timeout=PATIENCE)
    for width in (390, 768, 1280, 1920, 2560):
        page.set_viewport_size({"width": width, "height": 844})
        for name in TABS:
            open_tab(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is too wide at {width}"
        page.goto(page.url)
        expect(page.locator("#task-cards button")).to_have_count(4, timeout=PATIENCE)
        assert page.evaluate("window.scrollY") == 0, f"opened below its title at {width}"


def test_the_fields_of_a_row_stand_at_one_height(serve: Serve, page: "Page") -> None:
    page.goto(serve().url)
    expect(page.locator("#task-cards button")).to_have_count(4, timeout=PATIENCE)
    open_tab(page, "Train")
    page.locator("#train-more button").first.click()
    expect(page.locator("#train-save-steps input")).to_be_visible(timeout=PATIENCE)
    for width in (390, 768, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        rows = page.evaluate(FIELDS)
        assert sum(len(row) for row in rows.values()) == 12
        assert all(max(row) - min(row) <= 1 for row in rows.values()), f"at {width}: {rows}"


def test_a_card_has_a_border_on_every_side(serve: Serve, page: "Page") -> None:
    """Gradio writes the rules of a style sheet anew and may lose a side of which one of them speaks twice."""
    page.goto(serve().url)
    card = page.locator("#task-cards button").nth(1)
    expect(card).to_be_visible(timeout=PATIENCE)
    widths = card.evaluate("card => getComputedStyle(card).borderWidth")
    assert widths == "1px 1px 1px 4px"


def test_the_chosen_appearance_is_kept_and_motion_is_reduced_on_request(serve: Serve, page: "Page") -> None:
    page.emulate_media(reduced_motion="reduce")
    page.goto(serve().url)
    page.locator("#appearance").click()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
    page.reload()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"), timeout=PATIENCE)
    duration = page.locator("#send").evaluate("button => getComputedStyle(button).transitionDuration")
    assert all(float(one.removesuffix("s")) < 0.001 for one in duration.split(", "))
