"""Tiles at random scales from a few photographs, for experiments and benchmarks.

    python tools/make_tiles.py PHOTOGRAPHS OUT [--count 4000] [--width 500] [--height 375] [--quality 92] [--seed 0]

PHOTOGRAPHS is a folder of images at any depth. The tiles are JPEGs in OUT, without labels. Make those for validation
from other photographs. The default size is the most frequent one in ImageNet.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from rich.progress import track

from shards.command_line import run_command
from shards.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


@dataclass(frozen=True)
class MakeTiles:
    """Options of the command."""

    photographs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOGRAPHS")]
    """Folder of photographs."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Output folder; it must not exist."""
    count: int = 4000
    """Total number of tiles, divided evenly among the photographs."""
    width: int = 500
    """Width of a tile (pixels)."""
    height: int = 375
    """Height of a tile (pixels)."""
    quality: int = 92
    """JPEG quality (1 to 95)."""
    seed: int = 0
    """Seed of scales and positions."""


@cache
def _photograph(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def make_tile(index: int, *, paths: list[Path], options: MakeTiles) -> None:
    """Write tile `index`: a random crop of the tile's aspect ratio, resized to the tile's size.

    The crop's scale is log-uniform, from half the tile's size (upscaled) to the largest that fits.
    """
    path = paths[index % len(paths)]
    photograph = _photograph(path)
    rng = np.random.default_rng([options.seed, index])
    largest = min(photograph.width / options.width, photograph.height / options.height)
    scale = math.exp(rng.uniform(math.log(min(0.5, largest)), math.log(largest)))
    width, height = scale * options.width, scale * options.height
    left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    box = (left, top, left + width, top + height)
    tile = photograph.resize((options.width, options.height), Image.Resampling.LANCZOS, box)
    tile.save(options.out / f"{path.stem}-{index:06d}.jpg", quality=options.quality)


def main() -> None:
    options = tyro.cli(MakeTiles, description=__doc__)
    paths = sorted(path for path in options.photographs.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f"{options.photographs} has no photographs; name a folder of {', '.join(sorted(SUFFIXES))} files"
        )
    if options.out.exists():
        raise UserError(f"{options.out} exists already; delete it or name another folder")
    options.out.mkdir(parents=True)
    # Neighbours in the list share a photograph, so that each process decodes it once.
    order = sorted(range(options.count), key=lambda index: index % len(paths))
    with ProcessPoolExecutor() as pool:
        tiles = pool.map(partial(make_tile, paths=paths, options=options), order, chunksize=64)
        for _ in track(tiles, total=options.count, description="cutting tiles"):
            pass


if __name__ == "__main__":
    sys.exit(run_command(main, "tools/make_tiles.py"))
