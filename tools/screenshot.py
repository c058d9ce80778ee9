"""Take a picture of a page: python tools/screenshot.py runs/demo/report.html page.png [--part SELECTOR] [--dark]

Needs a Chromium (a browser on PATH, or `.venv/bin/playwright install chromium`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from playwright.sync_api import Browser, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Names on PATH that will do."""
REMEDY = "no Chromium: apt-get install chromium, or .venv/bin/playwright install chromium"


class NoBrowser(RuntimeError):
    """There is no Chromium; the message says where to get one."""


@dataclass(frozen=True)
class Screenshot:
    page: tyro.conf.Positional[Path]
    """HTML file."""
    out: tyro.conf.Positional[Path]
    """PNG file to write; its folder is made."""
    part: str | None = None
    """CSS selector of the part that is meant, as `.explorer`. Default: all of the page."""
    width: int = 1280
    """Of the window, in pixels."""
    dark: bool = False
    """Whether the page is asked for its dark colours."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, closed at the end. Raises NoBrowser where there is none."""
    with sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
        if not Path(installed).exists():
            raise NoBrowser(REMEDY)
        # As root, a Chromium with its sandbox does not start.
        arguments = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=installed, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def take(options: Screenshot) -> None:
    """Write the picture. Raises NoBrowser, and FileNotFoundError where there is no such page."""
    if not options.page.is_file():
        raise FileNotFoundError(f"{options.page} does not exist")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": options.width, "height": 800}, color_scheme="dark" if options.dark else "light"
        )
        page.goto(options.page.resolve().as_uri())
        if options.part is None:
            page.screenshot(path=options.out, full_page=True)
        else:
            page.locator(options.part).first.screenshot(path=options.out)


if __name__ == "__main__":
    try:
        take(tyro.cli(Screenshot, description=__doc__))
    except (NoBrowser, OSError) as error:
        sys.exit(f"tools/screenshot.py: {error}")
