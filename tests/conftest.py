"""Shards that the tests share, made by the real tool from small drawn images; one torch thread for small models."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize

# Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder with 'train' (100 images) and 'val' (24), 4 shards each: 48-px colour gradients of two classes."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 100), ("val", 24)):
        rng = np.random.default_rng(count)
        for number in range(count):
            kind = ("across", "down")[number % 2]
            ramp = np.linspace(0, 1, 48)[None, :, None] if kind == "across" else np.linspace(0, 1, 48)[:, None, None]
            first, last = rng.uniform(0, 255, size=(2, 3))
            pixels = (first + ramp * (last - first) + np.zeros((48, 48, 1))).clip(0, 255).astype(np.uint8)
            path = folder / split / kind / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)
        options = ShardingOptions(
            str(folder / split), folder / "shards", split, workers=1, shard=ShardSize(min_shards=4)
        )
        make_shards(options, Console(quiet=True))
    return folder / "shards"
