"""The explorer in a real browser: what it shows is what the stored data says, by keyboard and by pointer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from iwm.report.page import write_report
from iwm.report.runs import ReportError
from tests.report.explored import AXES, VALUES, Opened, Truth


def test_a_slider_moved_by_keyboard_shows_what_the_stored_data_says(opened: Opened, truth: Truth) -> None:
    shown = []
    for axis, key in (("brightness", "ArrowLeft"), ("hue", "ArrowRight"), ("saturation", "Home"), ("contrast", "End")):
        before = opened.at, opened.pixels("true")
        opened.slider(axis).press(key)
        assert (opened.at, opened.pixels("true")) != before
        view = truth.view(opened.at)
        assert opened.cell("true") == view
        assert opened.cell("retrieved") == truth.retrieved(0, 0, view)
        assert opened.rank == truth.rank(0, 0, view)
        assert opened.slider(axis).get_attribute("aria-valuetext")
        shown.append((opened.rank, opened.cell("retrieved")))
    assert len(set(shown)) > 1


def test_another_photograph_and_another_source_are_shown_at_once(opened: Opened, truth: Truth) -> None:
    view = truth.view(opened.at)
    first = opened.pixels("source"), opened.pixels("true")
    opened.page.get_by_label("photograph 2").check()
    assert opened.pixels("source") != first[0]
    assert opened.pixels("true") != first[1]
    assert (opened.rank, opened.cell("retrieved")) == (truth.rank(1, 0, view), truth.retrieved(1, 0, view))
    clean = opened.pixels("source")
    for source, name in enumerate(("grayscale", "blur", "solarize"), start=1):
        opened.page.get_by_label(name).check()
        assert opened.pixels("source") != clean
        assert opened.cell("source") == truth.result["bank"] + source
        assert (opened.rank, opened.cell("retrieved")) == (
            truth.rank(1, source, view),
            truth.retrieved(1, source, view),
        )
        assert f"undo {name}" in opened.answer


def test_buttons_go_to_the_action_that_they_name(opened: Opened, truth: Truth) -> None:
    ranks = truth.ranks(0, 0)
    opened.page.get_by_role("button", name="No change").click()
    assert opened.at == [1, 1, 1, 1]
    assert "Action: nothing." in opened.answer
    opened.page.get_by_role("button", name="Worst action").click()
    assert opened.rank == max(ranks) == ranks[truth.view(opened.at)]
    opened.page.get_by_role("button", name="Best action").click()
    assert opened.rank == min(ranks) == ranks[truth.view(opened.at)]
    opened.page.get_by_role("button", name="Random action").click()
    assert opened.rank == ranks[truth.view(opened.at)]


def test_the_map_scores_all_actions_and_goes_to_the_one_clicked(opened: Opened, truth: Truth) -> None:
    score = np.mean([1 / rank for rank in truth.ranks(0, 0)])
    assert opened.page.locator(".score").inner_text() == f"MRR {score:.3f}"
    box = opened.page.locator(".map").bounding_box()
    assert box is not None
    # The second of nine columns and the last of nine rows: the middle hue, all brightness and contrast.
    opened.page.locator(".map").click(position={"x": box["width"] * 1.5 / 9, "y": box["height"] * 8.5 / 9})
    assert opened.at == [2, 2, 0, 1]


def test_every_control_is_labelled_and_reached_by_tab(opened: Opened) -> None:
    reached = set()
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        reached.add(
            opened.page.evaluate(
                """() => { const e = document.activeElement, labels = [...(e.labels ?? [])];
                return e.ariaLabel || labels.map((label) => label.textContent).join() || e.textContent; }"""
            )
        )
    buttons = {"No change", "Random action", "Best action", "Worst action"}
    # Of radio buttons the chosen one is a stop; arrows go on from there.
    assert {*AXES, *buttons, "clean"} <= reached
    assert any(name.startswith("photograph 1, val-") for name in reached)
    assert opened.page.locator(".answer").get_attribute("aria-live") == "polite"


def test_words_and_numbers_hold_for_every_action(opened: Opened, truth: Truth) -> None:
    """Not only where the sliders happen to be: all 81 actions, set as a script would."""
    set_all = """(at) => { const inputs = [...document.querySelectorAll("input[type=range]")];
        inputs.forEach((input, a) => { input.value = at[a]; });
        inputs[0].dispatchEvent(new Event("input", { bubbles: true })); }"""
    words = truth.result["words"]
    for view in range(truth.result["bank"]):
        at = [int(place) for place in np.unravel_index(view, (VALUES,) * len(AXES))]
        opened.page.evaluate(set_all, at)
        said = ", ".join(filter(None, (words[axis][place] for axis, place in zip(AXES, at, strict=True)))) or "nothing"
        assert opened.answer.startswith(f"Action: {said}. The prediction ranks")
        assert (opened.rank, opened.cell("retrieved")) == (truth.rank(0, 0, view), truth.retrieved(0, 0, view))
    assert truth.rank(0, 0, 40) % 1 == 0.5, "no ties were tested"


def test_a_page_without_an_exploration_has_no_explorer_and_a_missing_file_is_named(
    explored: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(explored, copy)
    (copy / "eval" / "explorer-1.webp").unlink()
    with pytest.raises(ReportError, match=r"explorer-1\.webp: missing.*rerun iwm evaluate explorer"):
        write_report(copy)
    shutil.copy(explored / "eval" / "explorer-1.webp", copy / "eval")
    np.savez(copy / "eval" / "explorer.npz", points=np.zeros((2, 5, 80, 3), np.int16), norms=np.ones((2, 80)))
    with pytest.raises(ReportError, match=r"explorer\.npz: does not match.*rerun iwm evaluate explorer"):
        write_report(copy)
    (copy / "eval" / "explorer.json").unlink()
    assert 'class="explorer"' not in write_report(copy).read_text()
