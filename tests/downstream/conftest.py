"""Fixtures: shards of coloured boxes, and a run with a checkpoint of a small, untrained world model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dali_pipelines.crops import CropSettings
from iwm.config import Config, DataConfig
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import DataSettings, TrainSettings
from iwm.model_config import EncoderConfig, PredictorConfig
from iwm.models.world_model import WorldModel
from iwm.protocols import train_and_evaluate
from iwm.recipes import demo
from iwm.train_config import TrainConfig
from iwm.training.checkpoint import Checkpoint, save_checkpoint, versions
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}


@pytest.fixture(scope="session")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards of 48 px images of boxes on noise: splits 'train' (120 images) and 'val' (48).

    Label columns: `label` (red, green, blue) and `side` (left, right). Masks: 0 noise, 1 to 3 the box, by colour.
    """
    folder = tmp_path_factory.mktemp("boxes")
    for split, count in (("train", 120), ("val", 48)):
        rng = np.random.default_rng(count)
        rows = ["path,label,side,mask"]
        (folder / split).mkdir()
        for number in range(count):
            colour, side = rng.integers(3), rng.integers(2)
            pixels = rng.normal(128, 25, (48, 48, 3)).clip(0, 255).astype(np.uint8)
            mask = np.zeros((48, 48), np.uint8)
            top, left = rng.integers(4, 16), rng.integers(2, 6) + 22 * side
            box = (slice(top, top + 24), slice(left, left + 18))
            pixels[box], mask[box] = list(COLOURS.values())[colour], colour + 1
            Image.fromarray(pixels).save(folder / split / f"{number}.jpg", quality=95)
            Image.fromarray(mask).save(folder / split / f"{number}.png")
            name = list(COLOURS)[colour]
            rows.append(f"{split}/{number}.jpg,{name},{('left', 'right')[side]},{split}/{number}.png")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
        options = ShardingOptions(
            str(folder / f"{split}.csv"), folder / "shards", split, workers=1, shard=ShardSize(min_shards=4)
        )
        make_shards(options, Console(quiet=True))
    return folder / "shards"


@pytest.fixture(scope="session")
def small() -> Config:
    """Return the configuration of a very small run at 32 px, 16 patches."""
    return replace(
        demo(),
        data=DataConfig(shards="nowhere"),
        encoder=EncoderConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8, init="xavier"),
        predictor=PredictorConfig(embed_dim=16, depth=4, num_heads=2),
        train=replace(TrainConfig(), compile=False, precision="fp32", num_threads=1),
    )


@pytest.fixture
def run(tmp_path: Path, boxes: Path, small: Config) -> Path:
    """Return the folder of an untrained run."""
    return untrained(tmp_path / "run", replace(small, data=DataConfig(shards=str(boxes))))


def untrained(folder: Path, config: Config) -> Path:
    """Write a run's folder with one checkpoint, of step 7."""
    torch.manual_seed(0)
    save_checkpoint(
        folder,
        Checkpoint(
            config=config,
            step=7,
            samples=448,
            skipped=0,
            model=WorldModel(config).state_dict(),
            optimizer={},
            rng={},
            loader={},
            versions=versions(),
        ),
    )
    return folder


SHORT = {
    "steps": 6,
    "batch_size": 20,
    "micro_batch_size": None,
    "warmup_epochs": 0.0,
    "validate_every": 1.0,
    "log_every": 3,
}
"""Options that make any protocol short enough for a test."""


@pytest.fixture
def leverage(run: Path) -> Callable[..., dict[str, Any] | None]:
    """Return a function that runs a protocol in this process: `leverage("linear", lr=(1.0,))`."""

    def run_protocol(name: str, **options: Any) -> dict[str, Any] | None:
        return train_and_evaluate(name, settings_for(name, run, **options))

    return run_protocol


def settings_for(name: str, run: Path, **options: Any) -> TrainSettings:
    """Return a protocol's settings with SHORT options, and crops without RandAugment unless `crops` is given."""
    settings: TrainSettings = PROTOCOLS[name].settings(
        **({"checkpoint": run, "data": DataSettings(num_threads=1)} | SHORT | options)
    )
    if "crops" not in options and isinstance(getattr(settings, "crops", None), CropSettings):
        settings = replace(settings, crops=replace(settings.crops, rand_augment=None))
    return settings
