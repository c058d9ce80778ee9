"""Shards to measure on where the user names none: python benchmarks/generated.py makes them in data/benchmark."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

from mistakes import BenchmarkError
from photographs import PHOTOGRAPHS
from PIL import Image
from rich.console import Console

from shards.manifest import MANIFEST

TOOLS = Path(__file__).parents[1] / "tools"
GENERATED = Path("data/benchmark")
"""Where they are made."""
LABELLED = {"train": 256, "val": 16}
"""Images that have a label and a mask, by split."""


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
        _run(tool, *arguments)
    return shards


def labelled_shards(console: Console, folder: Path = GENERATED) -> Path:
    """Some of the same images with a label, and a mask of two classes: what is dark (1) and what is light (2)."""
    shards = folder / "labelled"
    if (shards / MANIFEST).exists():
        return shards
    generated_shards(console, folder)
    console.print(f"making shards with labels and masks in {shards}")
    masks, unfinished = folder / "masks", folder / "labelled.partial"
    for made in (shards, masks, unfinished):
        shutil.rmtree(made, ignore_errors=True)
    masks.mkdir()
    tiles = iter(sorted((folder / "tiles").rglob("*.jpg")))
    for split, count in LABELLED.items():
        rows = ["path,label,mask"]
        for number, tile in enumerate(islice(tiles, count)):
            mask = masks / f"{tile.stem}.png"
            with Image.open(tile) as image:
                image.convert("L").point(lambda level: 1 + level // 128).save(mask)
            rows.append(f"{tile.relative_to(folder)},class {number % 10},{mask.relative_to(folder)}")
        listing = folder / f"labelled_{split}.csv"
        listing.write_text("\n".join(rows) + "\n")
        _run("make_shards.py", listing, unfinished, "--split", split)
    # The manifest is there after the first split: only the whole folder has the name that is looked for.
    unfinished.rename(shards)
    return shards


def _run(tool: object, *arguments: object) -> None:
    command = [sys.executable, str(TOOLS / str(tool)), *map(str, arguments)]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise BenchmarkError(f"{' '.join(command)} ended with code {code}; its message stands above")


def main() -> int:
    try:
        labelled_shards(Console())
    except BenchmarkError as error:
        print(f"benchmarks/generated.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
