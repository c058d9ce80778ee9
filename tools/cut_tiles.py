"""Cut many tiles at random scales out of a few photographs: material for experiments and benchmarks.

    python tools/cut_tiles.py PHOTOGRAPHS OUT [--count 4000] [--width 500] [--height 375] [--quality 92] [--seed 0]

PHOTOGRAPHS is a folder of images, any depth; OUT gets JPEGs in one folder, which tools/make_shards.py takes as one
class: which photograph a tile is from says nothing of another split. The defaults are the commonest size of ImageNet's
images.
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

CLASS = "tile"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


@dataclass(frozen=True)
class CutTiles:
    photographs: Annotated[Path, tyro.conf.Positional]
    """Folder of photographs."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make; it must not exist."""
    count: int = 4000
    """Tiles in all, shared evenly by the photographs."""
    width: int = 500
    """Pixels."""
    height: int = 375
    """Pixels."""
    quality: int = 92
    """JPEG quality, 1 to 95."""
    seed: int = 0


@cache
def _photograph(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def cut(index: int, *, paths: list[Path], options: CutTiles) -> None:
    """Write tile `index`: a rectangle of the tile's aspect, from half the tile's size (enlarged) to all that fits."""
    path = paths[index % len(paths)]
    photograph = _photograph(path)
    rng = np.random.default_rng([options.seed, index])
    largest = min(photograph.width / options.width, photograph.height / options.height)
    scale = math.exp(rng.uniform(math.log(min(0.5, largest)), math.log(largest)))
    width, height = scale * options.width, scale * options.height
    left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    box = (left, top, left + width, top + height)
    tile = photograph.resize((options.width, options.height), Image.Resampling.LANCZOS, box)
    tile.save(options.out / CLASS / f"{path.stem}-{index:06d}.jpg", quality=options.quality)


def main() -> int:
    options = tyro.cli(CutTiles, description=__doc__)
    paths = sorted(path for path in options.photographs.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        print(f"cut_tiles: {options.photographs} holds no photographs ({', '.join(sorted(SUFFIXES))})", file=sys.stderr)
        return 1
    if options.out.exists():
        print(f"cut_tiles: {options.out} exists already; delete it or name another folder", file=sys.stderr)
        return 1
    (options.out / CLASS).mkdir(parents=True)
    # Neighbours in the list share a photograph, so that each process decodes it once.
    order = sorted(range(options.count), key=lambda index: index % len(paths))
    with ProcessPoolExecutor() as pool:
        tiles = pool.map(partial(cut, paths=paths, options=options), order, chunksize=64)
        for _ in track(tiles, total=options.count, description="cutting tiles"):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
