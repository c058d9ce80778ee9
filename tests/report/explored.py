"""The page of an explored run in a browser, and what it must show by the stored data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Locator, Page, Route

from iwm.evaluation.bank import TIE_TOLERANCE

VALUES = 3
AXES = ("brightness", "contrast", "saturation", "hue")


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


def open_page(browser: Browser, run: Path, width: int, scheme: Any, fragment: str = "") -> Opened:
    """Open the page of a run in a window of this width (pixels), without a network."""
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
