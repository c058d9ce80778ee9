"""Figures on the page in a real browser: every image is described, text from files is text, a phone has no overflow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page
from torch import Tensor

from iwm.evaluation.colour_scale import ColourScale
from iwm.evaluation.figures import (
    FigureTile,
    Matrix,
    TileBlock,
    TileColumn,
    TileFigure,
    TileGroup,
    write_figures,
)
from iwm.evaluation.similarity import FIGURES, tables
from iwm.report.page import write_report
from iwm.report.runs import ReportError
from tools.screenshot import NoBrowser, chromium

HOSTILE = '</figure><script>document.title = "taken"</script>"><img src=x onerror=alert(1)>'


def _view(level: int, side: int = 16) -> Tensor:
    return torch.full((side, side, 3), level, dtype=torch.uint8)


def _figures(key: str) -> list[TileFigure]:
    columns = [
        TileColumn(
            f"×{i}", (FigureTile(_view(20 * i), f"{key}, {i}: true"), FigureTile(_view(100), f"{key}, {i}", i % 2 == 0))
        )
        for i in range(11)
    ]
    block = TileBlock(key, columns, rows=("true", "nearest"), notes=(key,))
    scale = ColourScale(-0.5, 1.0)
    tile = FigureTile(scale.colours(torch.eye(6)), "the matrix", exact=True)
    matrix = Matrix(tile, [(key, FigureTile(_view(60 * i), f"{key}, {i}")) for i in range(3)])
    return [
        TileFigure(key, f"{key} are shown", [TileGroup(key, [block])], mark="the nearest view is the true view"),
        TileFigure("Matrix", key, matrix=matrix, scale=scale.bar(f"similarity of {key}")),
        TileFigure(key, "folded", [TileGroup("", [block])], folded=True),
    ]


def _run(folder: Path, key: str) -> Path:
    """Make a run folder with one result, whose figures are those of a photograph `key`."""
    output = folder / "eval" / "similarity.json"
    output.parent.mkdir(parents=True)
    score = {"mean": 0.5, "standard_error": 0.1}
    result: dict[str, Any] = {"protocol": "similarity", "encoder": key, "images": 3, "augmentations": 2, "shown": [key]}
    result |= dict.fromkeys(FIGURES, score) | write_figures(_figures(key), output)
    output.write_text(json.dumps(result | {"tables": [asdict(table) for table in tables(result)]}))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(chromium())
        except NoBrowser as error:
            pytest.skip(str(error))
        yield opened


def _open(browser: Browser, report: Path, width: int = 1280) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(report.as_uri())
    return page


def test_every_image_is_shown_with_its_description(browser: Browser, tmp_path: Path) -> None:
    page = _open(browser, write_report(_run(tmp_path, "photograph astronaut")))
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
    page = _open(browser, write_report(_run(tmp_path, HOSTILE)))
    assert "taken" not in page.title()
    assert page.locator("main script, [onerror]").count() == 0
    assert page.locator(".pictures h4").inner_text() == HOSTILE
    assert page.locator(".pictures img").first.get_attribute("alt") == f"{HOSTILE}, 0: true"
    page.close()


@pytest.mark.parametrize("key", ["photograph astronaut", "a-name-without-any-place-for-a-break" * 4])
def test_a_phone_shows_all_columns_without_scrolling_sideways(browser: Browser, tmp_path: Path, key: str) -> None:
    page = _open(browser, write_report(_run(tmp_path, key)), width=390)
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
    run = _run(tmp_path, "astronaut")
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
