"""How much damage to JPEGs is found? Prints shards/README.md's table: python benchmarks/strict_decoding.py [--trials N]

Each trial damages the compressed data of a 500×375 tile of one of scikit-image's photographs at a random place.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import tyro
from photographs import PHOTOGRAPHS
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shards.images import ImageRules, normalise
from shards.rejection import Rejected


def _overwritten(length: int, by: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Callable[..., bytes]:
    def damage(data: bytes, at: int, rng: np.random.Generator) -> bytes:
        old = np.frombuffer(data[at : at + length], np.uint8)
        return data[:at] + by(old, rng).astype(np.uint8).tobytes() + data[at + length :]

    return damage


DAMAGE: dict[str, Callable[[bytes, int, np.random.Generator], bytes]] = {
    "cut off anywhere": lambda data, at, rng: data[:at],
    "end mark missing": lambda data, at, rng: data[:-2],
    "4096 bytes lost (a disk block), none in their place": lambda data, at, rng: data[:at] + data[at + 4096 :],
    "4096 bytes zeroed": _overwritten(4096, lambda old, rng: 0 * old),
    "512 bytes zeroed": _overwritten(512, lambda old, rng: 0 * old),
    "64 bytes zeroed": _overwritten(64, lambda old, rng: 0 * old),
    "64 random bytes": _overwritten(64, lambda old, rng: rng.integers(0, 256, len(old))),
    "one byte inverted": _overwritten(1, lambda old, rng: 255 - old),
    "one bit flipped": _overwritten(1, lambda old, rng: old ^ (1 << rng.integers(0, 8))),
}
"""From the JPEG's bytes, a place in its compressed data and a generator to the damaged bytes."""


def tile(rng: np.random.Generator) -> bytes:
    """A random part of a photograph, as a JPEG of quality 92."""
    photograph = Image.open(PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))]).convert("RGB")
    height = rng.uniform(0.5, 1.0) * min(photograph.height, photograph.width * 0.75)
    left, top = rng.uniform(0, photograph.width - height / 0.75), rng.uniform(0, photograph.height - height)
    buffer = io.BytesIO()
    photograph.resize((500, 375), box=(left, top, left + height / 0.75, top + height)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def found_here(data: bytes) -> bool:
    try:
        normalise(data, ImageRules())
    except Rejected:
        return True
    return False


def found_by_pillow(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, SyntaxError):
        return True
    return False


def main(trials: int = 160, seed: int = 0) -> None:
    """Print the table.

    Args:
        trials: Damaged images per row.
        seed: Of photographs, places and damage.
    """
    table = Table("damage", "found here", "found by Pillow")
    for name, damage in track(DAMAGE.items(), "damaging"):
        rng = np.random.default_rng(seed)
        counts = np.zeros(2)
        for _ in range(trials):
            data = tile(rng)
            at = int(rng.integers(data.index(b"\xff\xda") + 16, len(data) - 4100))
            damaged = damage(data, at, rng)
            counts += (found_here(damaged), found_by_pillow(damaged))
        table.add_row(name, *(f"{count / trials:.0%}" for count in counts))
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
