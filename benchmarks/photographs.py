"""The photographs that benchmarks cut their images from: those of scikit-image's wheel, so no network is needed."""

from __future__ import annotations

from pathlib import Path

import skimage

_NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
PHOTOGRAPHS = tuple(Path(skimage.__file__).parent / "data" / name for name in _NAMES)
