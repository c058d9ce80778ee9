"""The explorer in a real browser: what it shows is what the stored data says, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from iwm.config import Config
from iwm.evaluation import explorer
from iwm.evaluation.bank import TIE_TOLERANCE
from iwm.evaluation.settings import BankSettings, RetrievalSettings
from iwm.protocols import evaluate
from iwm.report.page import write_report
from iwm.report.runs import ReportError
from tests.evaluation.conftest import untrained
from tools.demo import PICTURES
from tools.screenshot import NoBrowser, chromium

ROOT = Path(__file__).parents[2]

VALUES = 3
AXES = ("brightness", "contrast", "saturation", "hue")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """A run that was explored: two photographs, 3⁴ views. Its model is untrained, but heeds the action."""
    folder = untrained(tmp_path_factory.mktemp("explored") / "small", config)
    checkpoint = next((folder / "checkpoints").iterdir())
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["predictor.action_mixer.fc1.weight"][:, config.predictor.embed_dim :] *= 100
    torch.save(content, checkpoint)
    evaluate("explorer", explorer.ExplorerSettings(checkpoint=folder, num_images=2, num_values=VALUES))
    stored = folder / "eval" / "explorer.npz"
    arrays = dict(np.load(stored))
    arrays["points"][:, 0, 40] = arrays["points"][:, 0, 41]  # so that ties occur
    np.savez(stored, **arrays)
    bank = BankSettings(num_images=2, num_views=8)
    evaluate("retrieval", RetrievalSettings(checkpoint=folder, bank=bank, num_actions=1))
    return folder


@dataclass(frozen=True)
class Truth:
    """Ranks and nearest views by numpy, from the files that the page was made of."""

    result: dict[str, Any]
    points: np.ndarray
    norms: np.ndarray

    def view(self, at: list[int]) -> int:
        return int(np.ravel_multi_index(at, (VALUES,) * len(AXES)))

    def distances(self, photograph: int, source: int, view: int) -> np.ndarray:
        points = self.points[photograph].astype(float) * self.result["photographs"][photograph]["scale"]
        return np.linalg.norm(points[0] - points[1 + source, view], axis=1)

    def retrieved(self, photograph: int, source: int, view: int) -> int:
        return int(self.distances(photograph, source, view).argmin())

    def rank(self, photograph: int, source: int, view: int) -> float:
        distances = self.distances(photograph, source, view)
        tolerance = TIE_TOLERANCE * self.norms[photograph, view]
        nearer = (distances < distances[view] - tolerance).sum()
        return nearer + ((abs(distances - distances[view]) <= tolerance).sum() + 1) / 2

    def ranks(self, photograph: int, source: int) -> list[float]:
        return [self.rank(photograph, source, view) for view in range(self.result["bank"])]


@pytest.fixture(scope="module")
def truth(run: Path) -> Truth:
    arrays = np.load(run / "eval" / "explorer.npz")
    return Truth(json.loads((run / "eval" / "explorer.json").read_bytes()), arrays["points"], arrays["norms"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(chromium())
        except NoBrowser as error:
            pytest.skip(str(error))
        yield opened


@dataclass(frozen=True)
class Opened:
    """The page in a browser, and what went wrong in it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def slider(self, axis: str) -> Locator:
        return self.page.get_by_label(axis, exact=True)

    @property
    def at(self) -> list[int]:
        return [int(self.slider(axis).input_value()) for axis in AXES]

    @property
    def rank(self) -> float:
        return float(self.page.locator(".answer .rank").inner_text())

    @property
    def answer(self) -> str:
        return self.page.locator(".answer").inner_text().replace("\xa0", " ")

    def cell(self, role: str) -> int:
        """Place in the atlas of the picture that is shown."""
        return int(self.page.locator(f".{role} canvas").get_attribute("data-cell") or -1)

    def pixels(self, role: str) -> str:
        return str(self.page.locator(f".{role} canvas").evaluate("canvas => canvas.toDataURL()"))


def _open(browser: Browser, run: Path, width: int, scheme: Any, fragment: str = "") -> Opened:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = Opened(context.new_page())

    def refuse(route: Route) -> None:
        opened.requests.append(route.request.url)
        route.abort()

    context.route(lambda url: not url.startswith(("file:", "data:")), refuse)
    opened.page.on("console", lambda message: opened.errors.append(message.text))
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.page.goto((run / "report.html").as_uri() + fragment)
    opened.page.locator(".answer .rank").wait_for()
    return opened


@pytest.fixture
def opened(browser: Browser, run: Path) -> Iterator[Opened]:
    """The page on a desktop; after every test, without a word on the console or a request to anywhere."""
    opened = _open(browser, run, 1280, "light")
    yield opened
    opened.page.context.close()
    assert opened.errors == []
    assert opened.requests == []


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


STATE = "#explorer=explorer&photograph=2&source=blur&brightness=0&contrast=2&saturation=1&hue=1"


def test_the_address_keeps_the_state_and_restores_it(opened: Opened, browser: Browser, run: Path, truth: Truth) -> None:
    assert opened.page.evaluate("location.hash") == ""
    entries = opened.page.evaluate("history.length")
    opened.page.get_by_label("photograph 2").check()
    opened.page.get_by_label("blur", exact=True).check()
    for axis, key in (("brightness", "Home"), ("contrast", "End")):
        opened.slider(axis).press(key)
    opened.page.wait_for_function("state => location.hash.startsWith(state)", arg=STATE.partition("&saturation")[0])
    assert opened.page.evaluate("history.length") == entries
    again = _open(browser, run, 1280, "light", opened.page.evaluate("location.hash"))
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


def test_a_fragment_that_names_no_state_is_ignored(browser: Browser, run: Path) -> None:
    opened = _open(browser, run, 1280, "light", NO_STATES[-1])
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


def test_on_a_phone_the_views_stay_in_sight_while_sliders_and_map_are_used(browser: Browser, run: Path) -> None:
    phone = _open(browser, run, 390, "light")
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


def test_a_phone_shows_the_page_without_scrolling_sideways(browser: Browser, run: Path) -> None:
    phone = _open(browser, run, 375, "light")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 375
    right = phone.page.evaluate(
        "Math.max(...[...document.querySelectorAll('.explorer *')].map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 375
    phone.page.context.close()


def test_a_dark_screen_gets_a_dark_page(browser: Browser, run: Path) -> None:
    levels = []
    for scheme in ("light", "dark"):
        opened = _open(browser, run, 800, scheme)
        colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        levels.append(max(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")))
        opened.page.context.close()
    assert levels[0] > 200
    assert levels[1] < 60


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


def test_a_page_without_an_exploration_has_no_explorer_and_a_missing_file_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "eval" / "explorer-1.webp").unlink()
    with pytest.raises(ReportError, match=r"explorer-1\.webp: missing.*rerun iwm evaluate explorer"):
        write_report(copy)
    shutil.copy(run / "eval" / "explorer-1.webp", copy / "eval")
    np.savez(copy / "eval" / "explorer.npz", points=np.zeros((2, 5, 80, 3), np.int16), norms=np.ones((2, 80)))
    with pytest.raises(ReportError, match=r"explorer\.npz: does not match.*rerun iwm evaluate explorer"):
        write_report(copy)
    (copy / "eval" / "explorer.json").unlink()
    assert 'class="explorer"' not in write_report(copy).read_text()


def test_a_part_of_the_page_can_be_pictured(browser: Browser, run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "screenshot.py"), str(run / "report.html")]
    for name, more in {"light": (), "dark": ("--dark",)}.items():
        subprocess.run([*command, str(tmp_path / f"{name}.png"), "--part", ".explorer", *more], check=True)
    light, dark = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("light", "dark"))
    assert light.shape == dark.shape
    assert light.mean() > 128 > dark.mean()


def test_the_parts_that_readme_shows_are_on_the_page(opened: Opened) -> None:
    for part, _ in PICTURES.values():
        expect(opened.page.locator(part).first).to_be_visible()


def test_a_page_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "screenshot.py"), str(tmp_path / "none.html"), "x.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"tools/screenshot.py: .*none.html does not exist\n", done.stderr)
