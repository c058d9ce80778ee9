"""The page in a real browser: accessible in light and dark, on a desktop and a phone; charts and tables by keyboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from iwm.report.page import write_page, write_report
from tests.downstream.written_results import predictor, result
from tests.report.conftest import with_tables
from tests.report.test_action_sections import actions_in_a_row
from tests.report.test_compared_runs import _make, _with
from tests.report.written_figures import inferred_actions_result, write_similarity

SCHEMES = ("light", "dark")
WIDTHS = (1300, 390)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two arms of two seeds, each with its own page; the last run has all kinds of sections."""
    parent = tmp_path_factory.mktemp("study")
    runs = [
        _make(parent / f"{conditioning}-s{seed}", _with(conditioning, seed), 0.1 * (i + 1) + 0.01 * seed)
        for i, conditioning in enumerate(("sequence", "feature"))
        for seed in (0, 1)
    ]
    with open(runs[-1] / "metrics.jsonl", "a") as file:
        for step in (250, 500):
            health: dict[str, Any] = {"mrr_pooled": 0.5, "mrr_per_token": 0.4, "mrr_shuffled": 0.07, "rankme": 28.0}
            line = {"step": step, **health, "mrr_chance": 0.0741, "skipped": 2, "ema": 0.99 + step / 1e5}
            file.write(json.dumps(line) + "\n")
    score = {"mean": 0.4, "standard_error": 0.02}
    scores = dict.fromkeys(("with_action", "without_action", "shuffled", "restored"), score)
    how = {"images": 5, "bank": 256, "queries": 16, "chance": 0.0239, "distance": "pooled", "context": "teacher"}
    ops = [{"op": "blur", "trained": True, **scores, "strengths": [{"strength": "on", **scores}]}]
    corruptions = {"protocol": "corruptions", **how, "conditioning": "feature", "clean": scores, "figures": []}
    trials = [predictor(kind, 0.5 + seed / 50, seed) for kind in ("random", "pretrained") for seed in (0, 1)]
    left_out = {"knn": "split 'train' has no labels"}
    files = {
        "corruptions": with_tables({**corruptions, "ops": ops}),
        "composition": actions_in_a_row(0.4),
        "infer-action": with_tables(inferred_actions_result()),
        "finetune-predictor": result("finetune-predictor", *trials),
        "world-model": {"protocol": "world-model", "left_out": left_out, "tables": []},
    }
    for name, content in files.items():
        (runs[-1] / "eval" / f"{name}.json").write_text(json.dumps(content))
    write_similarity(runs[-1], "photograph astronaut")
    for run in runs[1:]:
        write_report(run)
    write_page(runs, parent / "comparison.html")
    return runs


def _open(browser: Browser, page: Path, width: int = 1300, scheme: Any = "light") -> Page:
    opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened.goto(page.as_uri())
    return opened


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_there_is_no_serious_fault_of_accessibility(
    browser: Browser, study: list[Path], kind: str, width: int, scheme: str
) -> None:
    page = _open(
        browser, study[-1] / "report.html" if kind == "run" else study[0].parent / "comparison.html", width, scheme
    )
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    page.locator("svg[data-readings]").first.focus()
    violations = Axe().run(page).response["violations"]
    serious = {
        fault["id"]: [node["html"] for node in fault["nodes"]]
        for fault in violations
        if fault["impact"] in ("serious", "critical")
    }
    assert serious == {}
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


def test_a_phone_shows_row_heads_and_at_least_one_column_of_every_table(browser: Browser, study: list[Path]) -> None:
    page = _open(browser, study[-1] / "report.html", 390)
    shares = page.evaluate(
        """[...document.querySelectorAll(".wide")].filter((wide) => wide.checkVisibility()).map((wide) =>
            wide.querySelector("tbody th").offsetWidth / wide.clientWidth)"""
    )
    assert shares
    assert max(shares) < 0.5


def test_a_chart_is_read_by_keyboard_and_by_pointer(browser: Browser, study: list[Path]) -> None:
    page = _open(browser, study[-1] / "report.html")
    chart = page.get_by_role("slider", name="loss")
    card = page.locator(".chart").filter(has=chart)
    reading = card.locator(".reading")
    assert reading.is_hidden()
    chart.focus()
    assert chart.get_attribute("aria-valuetext") == "500, loss: 0.002"
    page.keyboard.press("Home")
    assert reading.inner_text().split("\n") == ["50", "loss: 0.02"]
    page.keyboard.press("ArrowRight")
    assert chart.get_attribute("aria-valuetext") == "100, loss: 0.01"
    page.keyboard.press("Escape")
    assert reading.is_hidden()
    chart.blur()
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + box["height"] / 2)
    assert reading.inner_text().startswith("500")
    page.mouse.move(0, 0)
    assert reading.is_hidden()


def test_a_reading_stays_inside_a_phone(browser: Browser, study: list[Path]) -> None:
    page = _open(browser, study[-1] / "report.html", 390)
    for chart in page.get_by_role("slider").all()[:3]:
        chart.focus()
        for key in ("Home", "End"):
            page.keyboard.press(key)
            assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_runs_are_sorted_by_keyboard_and_lead_to_their_pages(browser: Browser, study: list[Path]) -> None:
    page = _open(browser, study[0].parent / "comparison.html")
    table = page.locator("table.sortable")

    def names() -> list[str]:
        return table.locator("tbody th").all_inner_texts()

    assert names() == ["sequence-s0", "sequence-s1", "feature-s0", "feature-s1"]
    head = table.locator("thead th").filter(has_text="MRR, pooled")
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert names() == ["feature-s1", "feature-s0", "sequence-s1", "sequence-s0"]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names() == ["sequence-s0", "sequence-s1", "feature-s0", "feature-s1"]
    table.get_by_role("button", name="run").click()
    assert table.locator("th[aria-sort]").all_inner_texts() == ["run"]
    assert names() == ["feature-s0", "feature-s1", "sequence-s0", "sequence-s1"]
    assert table.get_by_role("link").all_inner_texts() == ["feature-s0", "feature-s1", "sequence-s1"]
    table.get_by_role("link", name="feature-s1").click()
    assert page.url == (study[-1] / "report.html").as_uri()


def test_every_term_leads_to_its_entry_of_the_glossary(browser: Browser, study: list[Path]) -> None:
    page = _open(browser, study[-1] / "report.html")
    lost = page.evaluate(
        """[...document.querySelectorAll("a[href^='#']")].map((link) => link.hash.slice(1))
            .filter((anchor) => !document.getElementById(anchor))"""
    )
    assert lost == []
    page.locator(".tile a").first.click()
    assert page.evaluate("document.querySelector(':target').textContent") == "MRR"
