"""Shards to measure on where the user names none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from mistakes import BenchmarkError
from photographs import PHOTOGRAPHS
from rich.console import Console

from shards.manifest import MANIFEST

TOOLS = Path(__file__).parents[1] / "tools"
GENERATED = Path("data/benchmark")
"""Where they are made."""


def generated_shards(console: Console, folder: Path = GENERATED) -> Path:
    """Shards of photo-like JPEGs of ImageNet's commonest size, made once with the project's own tools."""
    shards = folder / "shards"
    if (shards / MANIFEST).exists():
        return shards
    console.print(f"making shards to measure on in {shards}")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "photographs").mkdir(parents=True)
    for photograph in PHOTOGRAPHS:
        shutil.copy(photograph, folder / "photographs")
    cut = ["cut_tiles.py", folder / "photographs", folder / "tiles", "--count", "1200"]
    make = ["make_shards.py", folder / "tiles", shards, "--split", "train"]
    for tool, *arguments in (cut, make):
        command = [sys.executable, str(TOOLS / str(tool)), *map(str, arguments)]
        if (code := subprocess.run(command, check=False).returncode) != 0:
            raise BenchmarkError(f"{' '.join(command)} ended with code {code}; its message stands above")
    return shards
