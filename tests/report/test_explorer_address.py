"""The explorer's state in the address: kept, restored, and ignored where it is none."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.report.explored import Opened, Truth, open_page

STATE = "#explorer=explorer&photograph=2&source=blur&brightness=0&contrast=2&saturation=1&hue=1"


def test_the_address_keeps_the_state_and_restores_it(
    opened: Opened, browser: Browser, explored: Path, truth: Truth
) -> None:
    assert opened.page.evaluate("location.hash") == ""
    entries = opened.page.evaluate("history.length")
    opened.page.get_by_label("photograph 2").check()
    opened.page.get_by_label("blur", exact=True).check()
    for axis, key in (("brightness", "Home"), ("contrast", "End")):
        opened.slider(axis).press(key)
    opened.page.wait_for_function("state => location.hash.startsWith(state)", arg=STATE.partition("&saturation")[0])
    assert opened.page.evaluate("history.length") == entries
    again = open_page(browser, explored, 1280, "light", opened.page.evaluate("location.hash"))
    assert (again.at, again.rank, again.answer) == (opened.at, opened.rank, opened.answer)
    assert [again.pixels(role) for role in ("source", "true")] == [opened.pixels(role) for role in ("source", "true")]
    assert again.page.locator(".explorer").evaluate("e => Math.abs(e.getBoundingClientRect().top)") < 800
    # A link to another state that is followed on the open page.
    again.page.evaluate("location.hash = arguments[0]".replace("arguments[0]", json.dumps(STATE)))
    again.page.wait_for_function(
        "document.querySelector('.true canvas').dataset.cell == " + str(truth.view([0, 2, 1, 1]))
    )
    assert (again.at, again.rank) == ([0, 2, 1, 1], truth.rank(1, 2, truth.view([0, 2, 1, 1])))
    assert again.errors == []
    again.page.context.close()


NO_STATES = (
    "#explorer",
    "#explorer=",
    "#explorer=another&photograph=2",
    "#explorer=explorer",
    STATE.replace("photograph=2", "photograph=3"),
    STATE.replace("photograph=2", "photograph=0"),
    STATE.replace("source=blur", "source=__proto__"),
    STATE.replace("source=blur", "source=<img src=x onerror=alert(1)>"),
    STATE.replace("hue=1", "hue=-1"),
    STATE.replace("hue=1", "hue=3"),
    STATE.replace("hue=1", "hue=1e0"),
    STATE.replace("&hue=1", ""),
    "#%E0%A4%A",
)


def test_a_fragment_that_names_no_state_is_ignored(browser: Browser, explored: Path) -> None:
    opened = open_page(browser, explored, 1280, "light", NO_STATES[-1])
    for fragment in NO_STATES:
        opened.page.evaluate("fragment => { location.hash = fragment; }", fragment)
        opened.page.evaluate("() => new Promise((resolve) => setTimeout(resolve))")
        assert opened.at == [2, 1, 2, 1], fragment
        assert opened.page.get_by_label("photograph 1").is_checked(), fragment
        assert opened.page.get_by_label("clean", exact=True).is_checked(), fragment
    assert (opened.errors, opened.requests) == ([], [])
    opened.page.evaluate("fragment => { location.hash = fragment; }", STATE)
    expect(opened.page.get_by_label("photograph 2")).to_be_checked()
    opened.page.context.close()


def test_links_of_the_page_still_lead_to_their_sections(opened: Opened) -> None:
    opened.page.get_by_role("link", name="Configuration").click()
    assert opened.page.evaluate("location.hash") == "#configuration"
    assert opened.page.locator("#configuration").evaluate("e => e.getBoundingClientRect().top") < 800
    assert opened.at == [2, 1, 2, 1]
