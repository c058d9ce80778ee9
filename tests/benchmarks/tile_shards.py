"""Small shards for the benchmarks' tests: tiles of one photograph, made with the project's tool."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import skimage.data
from PIL import Image

from tests.training.runs import ROOT

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in a 512×512 photograph (pixels)."""


def tile_shards(folder: Path, boxes: Iterable[Box]) -> Path:
    """Write a folder of shards with a JPEG of each box, without labels."""
    tiles = folder / "tiles" / "astronaut"
    tiles.mkdir(parents=True)
    photograph = Image.fromarray(skimage.data.astronaut())
    for number, box in enumerate(boxes):
        photograph.crop(box).save(tiles / f"{number}.jpg")
    make = [sys.executable, ROOT / "tools" / "make_shards.py"]
    subprocess.run([*make, tiles.parent, folder / "shards", "--split", "train"], check=True, capture_output=True)
    return folder / "shards"
