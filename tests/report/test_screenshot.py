"""tools/screenshot.py saves a page or a part of it, in light and dark."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, expect

from tests.report.explored import Opened
from tools.demo import PICTURES

ROOT = Path(__file__).parents[2]


def test_a_part_of_the_page_can_be_pictured(browser: Browser, explored: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "screenshot.py"), str(explored / "report.html")]
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
