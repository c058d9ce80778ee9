"""Demo data set: tiles of public photographs with one drawn object each.

    python tools/make_demo_data.py OUT [--train 4096] [--val 384] [--seed 0]

The photographs are those in scikit-image's wheel, so no network is needed. Training and validation tiles come from
different photographs. Each tile has a class (`label`: the object's shape), three further labels (`colour`, `texture`,
`place`), and a segmentation mask: 0 for the photograph, 1 + the index of the object's colour in sorted(COLOURS) for the
object. The outputs OUT/train/tiles.csv and OUT/val/tiles.csv have the columns path, label, colour, texture, place and
mask, for tools/make_shards.py.
"""

from __future__ import annotations

import colorsys
import csv
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw

from shards.command_line import run_command
from shards.errors import UserError

TILE = 64
"""Side of a tile (pixels)."""
OVERSAMPLING = 4
"""Factor by which objects are drawn larger before they are averaged, for smooth edges and textures."""
SMALLEST_DEVIATION = 12.0
"""Minimum standard deviation of a cut (grey levels). Below it, e.g. for an empty sky, another cut is sampled."""

PHOTOGRAPHS = {
    "train": {
        "astronaut.png": 1.0,
        "motorcycle_left.png": 1.0,
        "motorcycle_right.png": 0.5,
        "ihc.png": 1.0,
        "retina.jpg": 0.7,
        "hubble_deep_field.jpg": 0.5,
    },
    "val": {"chelsea.png": 1.0, "coffee.png": 1.0, "rocket.jpg": 1.0},
}
"""Per split: file in skimage/data and its relative number of tiles. Both motorcycle files show the same scene."""

Box = tuple[float, float, float, float]
INSIDE: dict[str, Box] = {"retina.jpg": (0.15, 0.15, 0.85, 0.85)}
"""Part of a photograph that tiles are cut from: left, top, right, bottom (0 to 1). Default: the whole photograph."""

COLOURS = {name: i / 6 for i, name in enumerate(("red", "yellow", "green", "cyan", "blue", "magenta"))}
"""Hue of each object colour (turns, 0 to 1)."""


class DemoDataError(UserError):
    """The demo's data cannot be made. The message names the cause and the remedy."""


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon of radius 1; with `inner` below 1, of a star with that inner radius."""
    steps = corners if inner == 1.0 else 2 * corners
    radii = [inner if inner != 1.0 and i % 2 else 1.0 for i in range(steps)]
    return [
        (r * math.sin(2 * math.pi * i / steps), -r * math.cos(2 * math.pi * i / steps)) for i, r in enumerate(radii)
    ]


_ARM = 0.36
SHAPES: dict[str, list[tuple[float, float]]] = {
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "disc": _regular(64),
    "drop": [
        (0, -1.3),
        *[(0.8 * math.sin(t), 0.2 - 0.8 * math.cos(t)) for t in np.linspace(0.9, 2 * math.pi - 0.9, 40)],
    ],
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "star": _regular(5, inner=0.45),
    "triangle": _regular(3),
}  # fmt: skip
"""Outline of each class, around (0, 0), in units of the object's radius."""


def _plain(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    return np.zeros_like(x)


def _stripes(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    return np.floor(2 * x / period) % 2


def _checks(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    return (np.floor(2 * x / period) + np.floor(2 * y / period)) % 2


def _dots(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    return ((x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.3 * period) ** 2).astype(float)


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
}
"""Functions of pixel coordinates (x, y) and a period (pixels): 1 where the object has its second shade, else 0."""


@dataclass(frozen=True)
class Tile:
    """One tile with its mask and labels."""

    image: Image.Image
    """RGB image, TILE×TILE."""
    mask: Image.Image
    """8-bit grey image, TILE×TILE: 0 on the photograph, 1 + index of the colour in sorted(COLOURS) on the object."""
    labels: dict[str, str]
    """Column → class name of `label` (the shape), `colour`, `texture` and `place`, in this order."""


def photographs() -> Path:
    """Return the folder of scikit-image's images. Raise DemoDataError where the package or a photograph is missing."""
    try:
        folder = Path(str(resources.files("skimage") / "data"))
    except ModuleNotFoundError as error:
        raise DemoDataError("scikit-image is not installed; run: pip install -e '.[demo]'") from error
    missing = [name for split in PHOTOGRAPHS.values() for name in split if not (folder / name).exists()]
    if missing:
        raise DemoDataError(f"{folder} lacks {missing}; reinstall scikit-image (0.26 has them)")
    return folder


@cache
def _photograph(name: str) -> Image.Image:
    image = Image.open(photographs() / name).convert("RGB")
    left, top, right, bottom = INSIDE.get(name, (0.0, 0.0, 1.0, 1.0))
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))


def draw_tile(split: str, index: int, seed: int) -> Tile:
    """Draw tile `index` of a split: a square cut of a photograph at a random scale, with one object.

    Its random numbers depend on (seed, split, index) alone, so tiles can be drawn in any order.
    """
    rng = np.random.default_rng([seed, sorted(PHOTOGRAPHS).index(split), index])
    shares = PHOTOGRAPHS[split]
    weights = np.array(list(shares.values()))
    photograph = _photograph(str(rng.choice(list(shares), p=weights / weights.sum())))
    image = _cut(photograph, rng)

    shape = str(rng.choice(sorted(SHAPES)))
    colour = str(rng.choice(sorted(COLOURS)))
    texture = str(rng.choice(sorted(TEXTURES)))
    radius = rng.uniform(0.16, 0.3) * TILE
    x, y = rng.uniform(radius, TILE - radius, size=2)
    alpha = _draw_shape(SHAPES[shape], x, y, radius, turn=rng.uniform(-0.06, 0.06))
    paint = _paint(COLOURS[colour], texture, rng)
    image.paste(paint, mask=alpha)
    mask = alpha.point([0] * 128 + [1 + sorted(COLOURS).index(colour)] * 128)
    place = f"{'top' if y < TILE / 2 else 'bottom'}-{'left' if x < TILE / 2 else 'right'}"
    return Tile(image, mask, {"label": shape, "colour": colour, "texture": texture, "place": place})


def _cut(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out a square, whose side is log-uniform from TILE to the shorter side, and resize it to TILE×TILE."""
    while True:
        side = math.exp(rng.uniform(math.log(TILE), math.log(min(photograph.size))))
        left, top = rng.uniform(0, photograph.width - side), rng.uniform(0, photograph.height - side)
        tile = photograph.resize((TILE, TILE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        if np.asarray(tile.convert("L")).std() >= SMALLEST_DEVIATION:
            return tile


def _draw_shape(outline: list[tuple[float, float]], x: float, y: float, radius: float, turn: float) -> Image.Image:
    """Return the object's coverage (8-bit, TILE×TILE). `x`, `y`, `radius` in pixels; `turn` in turns."""
    c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    canvas = Image.new("L", (TILE * OVERSAMPLING, TILE * OVERSAMPLING))
    points = [(x + radius * (c * u - s * v), y + radius * (s * u + c * v)) for u, v in outline]
    ImageDraw.Draw(canvas).polygon([(OVERSAMPLING * px, OVERSAMPLING * py) for px, py in points], fill=255)
    return canvas.resize((TILE, TILE), Image.Resampling.BOX)


def _paint(hue: float, texture: str, rng: np.random.Generator) -> Image.Image:
    """Return a TILE×TILE image of the object's material: two shades of a hue in the texture's pattern, with noise."""
    hue += rng.uniform(-0.05, 0.05)
    light, saturation = rng.uniform(0.45, 0.95), rng.uniform(0.5, 0.95)
    first = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, light))
    second = np.array(colorsys.hsv_to_rgb(hue % 1, 0.5 * saturation, light * 0.4 if light > 0.7 else 1.0))
    turn, period = rng.uniform(0, math.pi), rng.uniform(6, 11)
    fine = TILE * OVERSAMPLING
    row, column = np.mgrid[:fine, :fine] / OVERSAMPLING
    along, across = math.cos(turn) * column + math.sin(turn) * row, math.cos(turn) * row - math.sin(turn) * column
    pattern = TEXTURES[texture](along, across, period)
    pattern = pattern.reshape(TILE, OVERSAMPLING, TILE, OVERSAMPLING).mean((1, 3))[..., None]
    pixels = 255 * (pattern * second + (1 - pattern) * first) + rng.normal(0, 5, size=(TILE, TILE, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_tile(index: int, *, folder: Path, split: str, seed: int) -> list[str]:
    tile = draw_tile(split, index, seed)
    image, mask = f"{split}-{index:05d}.jpg", f"{split}-{index:05d}-mask.png"
    tile.image.save(folder / image, quality=92, subsampling=0)
    tile.mask.save(folder / mask)
    return [image, *tile.labels.values(), mask]


def tiles_csv(folder: Path, split: str) -> Path:
    """Return the path of a split's table. Its tiles are in the same folder."""
    return folder / split / "tiles.csv"


def make_split(folder: Path, split: str, tiles: int, seed: int = 0) -> Path:
    """Write a split's tiles and masks, on all cores, and then its CSV in `folder`; return the CSV's path."""
    photographs()
    path = tiles_csv(folder, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    write = partial(_write_tile, folder=path.parent, split=split, seed=seed)
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(write, range(tiles), chunksize=64))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "colour", "texture", "place", "mask"], *rows])
    return path


def main(out: tyro.conf.Positional[Path], train: int = 4096, val: int = 384, seed: int = 0) -> None:
    """Make the demo's data.

    Args:
        out: Folder to write; made if it does not exist.
        train: Training tiles.
        val: Validation tiles, from other photographs.
        seed: Same seed, same pixels.
    """
    for split, tiles in (("train", train), ("val", val)):
        print(f"{make_split(out, split, tiles, seed)}: {tiles} tiles")


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main), "tools/make_demo_data.py"))
