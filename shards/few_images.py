"""Advice about the number of training images. Making shards and training print it."""

from __future__ import annotations

PAPER_IMAGES = 1_281_167
"""Images that the paper trains on (ImageNet-1k)."""

FEW_IMAGES = PAPER_IMAGES // 10
"""Number of images below which the advice is given."""


def few_images_advice(images: int) -> list[str]:
    """Return one line about a training split with this number of images; no line where they are not few."""
    if images >= FEW_IMAGES:
        return []
    return [
        f"{images:,} training images are few: the paper has {PAPER_IMAGES:,}. From 4,096 tiles of six photographs the "
        "recipe demo, a small model, learns what photometric actions do (MRR 0.39, chance 0.02), but hardly to tell "
        "shapes apart. tools/make_tiles.py, in a checkout, cuts many images from few photographs"
    ]
