"""Figures on the page in a real browser: every image is described, text from files is text, a phone has no overflow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from iwm.report.page import write_report
from iwm.report.runs import ReportError
from tests.report.written_figures import write_similarity

HOSTILE = '</figure><script>document.title = "taken"</script>"><img src=x onerror=alert(1)>'


def _open(browser: Browser, report: Path, width: int = 1280) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(report.as_uri())
    return page


def test_every_image_is_shown_with_its_description(browser: Browser, tmp_path: Path) -> None:
    page = _open(browser, write_report(write_similarity(tmp_path, "photograph astronaut")))
    alts = page.locator(".pictures img").evaluate_all("images => images.map((image) => image.alt)")
    assert len(alts) == 2 * 22 + 1 + 3 + 1
    assert all(alts)
    assert page.get_by_role("img", name="photograph astronaut, 4: true", exact=True).count() == 1
    drawn = page.locator(".pictures img").evaluate_all("images => images.map((image) => image.naturalWidth)")
    assert set(drawn) == {16, 6, 256}
    marked = page.locator(".pictures").first.locator(".cell:has(.mark) img")
    assert marked.evaluate_all("images => images.map((image) => image.alt)") == [
        f"photograph astronaut, {i}" for i in range(0, 11, 2)
    ]
    caption = page.locator("figcaption").first.inner_text()
    assert re.sub(r"\s+", " ", caption) == "photograph astronaut are shown ✓ the nearest view is the true view."
    assert page.locator("details .pictures").count() == 1
    page.close()


def test_text_from_files_stays_text(browser: Browser, tmp_path: Path) -> None:
    page = _open(browser, write_report(write_similarity(tmp_path, HOSTILE)))
    assert "taken" not in page.title()
    assert page.locator("main script, [onerror]").count() == 0
    assert page.locator(".pictures h4").inner_text() == HOSTILE
    assert page.locator(".pictures img").first.get_attribute("alt") == f"{HOSTILE}, 0: true"
    page.close()


@pytest.mark.parametrize("key", ["photograph astronaut", "a-name-without-any-place-for-a-break" * 4])
def test_a_phone_shows_all_columns_without_scrolling_sideways(browser: Browser, tmp_path: Path, key: str) -> None:
    page = _open(browser, write_report(write_similarity(tmp_path, key)), width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = page.locator(".pictures img").evaluate_all(
        "images => images.map((i) => [i.getBoundingClientRect().right, i.offsetWidth])"
    )
    assert len(boxes) == 2 * 22 + 1 + 3 + 1
    assert max(right for right, _ in boxes) <= 390
    columns = page.locator(".columns img").evaluate_all("images => images.map((i) => i.offsetWidth)")
    assert min(columns) >= 50
    page.close()


def test_images_that_are_missing_and_results_of_other_versions_are_named_with_the_remedy(tmp_path: Path) -> None:
    run = write_similarity(tmp_path, "astronaut")
    archive, stored = run / "eval" / "similarity.zip", run / "eval" / "similarity.json"
    content, result = archive.read_bytes(), json.loads(stored.read_bytes())
    remedy = r"rerun iwm evaluate similarity"
    archive.write_bytes(b"no zip")
    with pytest.raises(ReportError, match=rf"similarity\.zip: the images of a figure cannot be read.*{remedy}"):
        write_report(run)
    archive.write_bytes(content)
    other = json.loads(json.dumps(result).replace("0003.webp", "other.webp"))
    stored.write_text(json.dumps(other))
    with pytest.raises(ReportError, match=rf"similarity\.zip: lacks other\.webp; {remedy}"):
        write_report(run)
    stored.write_text(json.dumps({**result, "figures": [{"title": "x"}]}))
    with pytest.raises(ReportError, match=rf"figures are malformed.*{remedy}"):
        write_report(run)
    del result["figures"]
    stored.write_text(json.dumps({**result, "picture": "similarity.png"}))
    with pytest.raises(ReportError, match=r"lacks 'figures', so another version of iwm wrote it; evaluate again"):
        write_report(run)
