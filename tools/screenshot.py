"""Screenshot of an HTML page: python tools/screenshot.py runs/demo/report.html page.png [--part SELECTOR] [--dark]

Needs Chromium: a browser on PATH, or `.venv/bin/playwright install chromium`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from playwright.sync_api import Browser, sync_playwright

from shards.command_line import run_command
from shards.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Names of suitable browsers on PATH."""
REMEDY = "no Chromium found; run: apt-get install chromium, or .venv/bin/playwright install chromium"


class NoBrowser(UserError):
    """Chromium is not installed. The message names the remedy."""


@dataclass(frozen=True)
class Screenshot:
    """Options of the command."""

    page: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PAGE")]
    """HTML file."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """PNG file to write; its folder is created."""
    part: str | None = None
    """CSS selector of the part to capture, for example `.explorer`. Default: the whole page."""
    width: int = 1280
    """Width of the window (pixels)."""
    dark: bool = False
    """Use the page's dark colour scheme."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a headless Chromium and close it at the end. Raise NoBrowser where none is installed."""
    with sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
        if not Path(installed).exists():
            raise NoBrowser(REMEDY)
        # Chromium's sandbox does not start as root.
        arguments = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=installed, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def take(options: Screenshot) -> None:
    """Write the screenshot. Raise NoBrowser without Chromium, and FileNotFoundError where the page does not exist."""
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
    sys.exit(run_command(lambda: take(tyro.cli(Screenshot, description=__doc__)), "tools/screenshot.py"))
