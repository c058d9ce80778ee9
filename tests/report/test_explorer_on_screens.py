"""The explorer on a phone and on a dark screen."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from tests.report.explored import open_page


def test_on_a_phone_the_views_stay_in_sight_while_sliders_and_map_are_used(browser: Browser, explored: Path) -> None:
    phone = open_page(browser, explored, 390, "light")
    views = phone.page.locator(".views")
    for control in (".slider:last-child input", ".map"):
        phone.page.locator(control).evaluate("e => e.scrollIntoView({ block: 'end' })")
        box = views.bounding_box()
        assert box is not None
        assert 0 <= box["y"] < 100
        assert box["height"] < 200
        below = phone.page.locator(control).bounding_box()
        assert below is not None
        assert below["y"] + below["height"] > box["y"] + box["height"]
    before = phone.pixels("true")
    phone.slider("hue").press("ArrowLeft")
    assert phone.pixels("true") != before
    assert views.locator(".true figcaption").inner_text() == f"true view: rank {phone.rank:g}"
    assert phone.errors == []
    phone.page.context.close()


def test_a_phone_shows_the_page_without_scrolling_sideways(browser: Browser, explored: Path) -> None:
    phone = open_page(browser, explored, 375, "light")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 375
    right = phone.page.evaluate(
        "Math.max(...[...document.querySelectorAll('.explorer *')].map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 375
    phone.page.context.close()


def test_a_dark_screen_gets_a_dark_page(browser: Browser, explored: Path) -> None:
    levels = []
    for scheme in ("light", "dark"):
        opened = open_page(browser, explored, 800, scheme)
        colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        levels.append(max(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")))
        opened.page.context.close()
    assert levels[0] > 200
    assert levels[1] < 60
