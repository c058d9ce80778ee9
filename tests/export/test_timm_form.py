"""Exported folders as timm models, in a process that cannot import this project."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import iwm
from dali_pipelines.crops import resized_side
from iwm.export.__main__ import ExportOptions, export
from iwm.export.images import to_pixels
from iwm.export.timm_config import architecture, crop_share
from tests.export.local_dir import needs_local_dir
from tests.export.test_export import CONFIG, make_run

THREE_LAYERS = replace(CONFIG, encoder=replace(CONFIG.encoder, depth=3))
"""timm's features_only returns three layers."""


def without_iwm(name: str, image: Path, out: Path, **environment: str) -> dict[str, Any]:
    """Run without_iwm.py and return what it saved."""
    script = Path(__file__).with_name("without_iwm.py")
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", script, name, image, out],
        cwd=out.parent,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    saved: dict[str, Any] = torch.load(out)
    return saved


def photo(path: Path, height: int = 90, width: int = 131) -> Path:
    """Write a smooth image with noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    ramp = 255 * (rows * rng.uniform(size=3) + columns * rng.uniform(size=3)) / 2
    Image.fromarray((ramp + rng.uniform(0, 12, (height, width, 3))).astype(np.uint8)).save(path)
    return path


@needs_local_dir
@pytest.mark.parametrize("size", [32, 48])
def test_stock_timm_has_the_models_pixels_and_features(tmp_path: Path, size: int) -> None:
    config = replace(THREE_LAYERS, views=replace(CONFIG.views, size=size))
    export(ExportOptions(make_run(tmp_path / "run", config), tmp_path / "model"))
    image = photo(tmp_path / "photo.png")
    stock = without_iwm(f"local-dir:{tmp_path / 'model'}", image, tmp_path / "out.pt")
    model = iwm.load(tmp_path / "model")

    pixels = stock["pixels"].round().to(torch.uint8).permute(0, 2, 3, 1)
    difference = (pixels.int() - model.pixels(image).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.2  # Pillow rounds twice, after rows and after columns

    torch.testing.assert_close(stock["features"], model.features(pixels), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stock["pooled"], model(pixels), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stock["output"], stock["pooled"])
    assert stock["layer"].shape == (1, 48, size // 8, size // 8)
    assert stock["seven"].shape == (1, 7)
    assert stock["classes"] is None


@needs_local_dir
@pytest.mark.parametrize("name", ["linear", "finetune-encoder"])
def test_stock_timm_classifies_with_an_exported_linear_head(
    leverage: Callable[..., dict[str, Any]], run: Path, tmp_path: Path, name: str
) -> None:
    """Images for a finetuned encoder are resized with the bicubic filter of its training, others bilinear."""
    leverage(name, lr=(1e-3,))
    export(ExportOptions(run, tmp_path / "model", head=run / "eval" / name))
    image = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)).save(image)
    stock = without_iwm(f"local-dir:{tmp_path / 'model'}", image, tmp_path / "out.pt")
    model = iwm.load(tmp_path / "model")
    pixels = stock["pixels"].round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (pixels.int() - model.pixels(image).int()).abs().max() <= 2
    other = to_pixels(image, model.device, 32, interpolation="linear" if name == "finetune-encoder" else "cubic")
    assert (pixels.int() - other.int()).abs().max() > 5, "the filters are not told apart"
    torch.testing.assert_close(stock["output"], model.classify(pixels), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(stock["pooled"], model(pixels), atol=2e-5, rtol=1e-4)
    assert stock["classes"] == list(model.classes) == ["blue", "green", "red"]
    assert stock["seven"].shape == (1, 7)


def test_timm_resizes_every_size_as_evaluation_does() -> None:
    for size in range(8, 2049):
        assert math.floor(size / crop_share(size)) == resized_side(size)
    assert crop_share(224) == 0.875


@pytest.mark.parametrize(
    ("width", "patch", "name"),
    [
        (192, 16, "vit_tiny_patch16_224"),
        (768, 16, "vit_base_patch16_224"),
        (1024, 14, "vit_large_patch14_224"),
        (1280, 14, "vit_huge_patch14_224"),
        (768, 13, "vit_base_patch16_224"),
        (100, 16, "vit_base_patch16_224"),
    ],
)
def test_published_sizes_have_timms_names(width: int, patch: int, name: str) -> None:
    assert architecture(width, patch) == name
    assert timm.is_model(name)
