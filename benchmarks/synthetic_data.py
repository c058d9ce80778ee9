"""Synthetic shards of the benchmarks, in data/benchmark: python benchmarks/synthetic_data.py

They are used where the user gives no shards. Their images are cut from scikit-image's photographs, which its wheel
contains, so no network is needed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from environment import BenchmarkError
from PIL import Image
from rich.console import Console

from iwm.config import DataConfig
from shards.command_line import run_command
from shards.format import MANIFEST, load_manifest

if TYPE_CHECKING:
    from iwm.training.distributed import DistEnv

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
"""Files of scikit-image that the images are cut from."""

TOOLS = Path(__file__).parents[1] / "tools"
GENERATED = Path("data/benchmark")
"""Folder of the generated shards."""
LABELLED = {"train": 1024, "val": 16}
"""Number of images with a label and a mask, by split."""


def generated_shards(console: Console, folder: Path = GENERATED) -> Path:
    """Return shards of photo-like JPEGs of ImageNet's most common size, generated once with the project's tools."""
    shards = folder / "shards"
    if (shards / MANIFEST).exists():
        return shards
    console.print(f"generating benchmark shards in {shards}")
    shutil.rmtree(folder, ignore_errors=True)
    generated_tiles(folder, 1200)
    _run("-m", "shards", folder / "tiles", shards)
    return shards


def generated_tiles(folder: Path, count: int) -> Path:
    """Cut photo-like JPEGs of ImageNet's most common size into the new folder `folder`/tiles, and return it."""
    skimage = importlib.util.find_spec("skimage")
    if skimage is None or skimage.origin is None:
        raise BenchmarkError("scikit-image is missing: pip install scikit-image, or measure your own data")
    (folder / "photographs").mkdir(parents=True)
    for photograph in PHOTOGRAPHS:
        shutil.copy(Path(skimage.origin).parent / "data" / photograph, folder / "photographs")
    _run(TOOLS / "make_tiles.py", folder / "photographs", folder / "tiles", "--count", count)
    return folder / "tiles"


def labelled_shards(console: Console, folder: Path = GENERATED) -> Path:
    """Return shards of some of these images with a label and a mask of two classes: dark (1) and light (2) pixels."""
    shards = folder / "labelled"
    if (shards / MANIFEST).exists():
        return shards
    generated_shards(console, folder)
    console.print(f"generating shards with labels and masks in {shards}")
    masks, unfinished = folder / "masks", folder / "labelled.partial"
    for leftover in (shards, masks, unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
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
        _run("-m", "shards", listing, unfinished, "--split", split)
    # The manifest exists after the first split, so the folder gets its final name only when it is complete.
    unfinished.rename(shards)
    return shards


def _run(*arguments: object) -> None:
    command = [sys.executable, *map(str, arguments)]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise BenchmarkError(f"{' '.join(command)} ended with code {code}; see its message above")


def prepare_shards(data: DataConfig, dist: DistEnv, console: Console) -> None:
    """Generate the default shards if they are used. All processes must call this first.

    Raises BenchmarkError where the shards have fewer images than one step needs.
    """
    if dist.is_main and data.folder == GENERATED / "shards":
        generated_shards(console)
    dist.all_gather("shards generated")
    samples = load_manifest(data.folder, data.train).samples
    if samples < data.global_batch_size:
        raise BenchmarkError(
            f"--data.global-batch-size {data.global_batch_size}: "
            f"{data.shards} has only {samples} images in '{data.train}'; choose at most {samples}"
        )


def main() -> None:
    labelled_shards(Console())


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/synthetic_data.py"))
