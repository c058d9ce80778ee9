"""The loader of labelled crops: boxes, ops, errors and resuming."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_shards import jpeg, photographs_and_noise, write_split
from scipy.stats import binomtest, ks_2samp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from dali_pipelines import replay
from dali_pipelines.augmentations import IDENTITY, PHOTOMETRIC_FIELDS, SINGLE_OP, AugmentationError, PhotometricConfig
from dali_pipelines.crops import CropSettings
from dali_pipelines.loader import CropLoader, LabelledBatch, LoaderStateError
from shards.errors import ShardError

SMALL = CropSettings(size=32, photometric=PhotometricConfig())
WHOLE = CropSettings(size=48, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0)
"""Crops that cover all of a square image."""


def loader(folder: Path, crops: CropSettings = SMALL, **settings: Any) -> CropLoader:
    defaults: dict[str, Any] = {"label": "row", "batch_size": 8, "seed": 5, "num_threads": 1}
    return CropLoader(folder, "train", crops, **defaults | settings)


def equal(a: LabelledBatch, b: LabelledBatch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and list(a.keys) == list(b.keys)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Write twelve square photographs and random images."""
    folder = tmp_path_factory.mktemp("squares")
    images = []
    for content in photographs_and_noise(12, side=200):
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        side = min(pixels.shape[:2])
        images.append(jpeg(np.ascontiguousarray(pixels[:side, :side])))
    write_split(folder, "train", images, per_shard=(12,))
    return folder, images


def of_all_squares(folder: Path, crops: CropSettings, **settings: Any) -> Tensor:
    """Return one crop of each square, in the order of their labels."""
    batch = next(loader(folder, crops, batch_size=12, **settings))
    return batch.images[batch.labels.argsort()].cpu()


def test_labels_and_keys_belong_to_the_images(shards: Path, device: str) -> None:
    endless = loader(shards, device=device)
    seen: set[int] = set()
    for _ in range(endless.batches_per_epoch):
        batch = next(endless)
        assert batch.images.shape == (8, 32, 32, 3)
        assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.images.device.type == batch.labels.device.type == device
        assert [f"train{row:06d}" for row in batch.labels.tolist()] == list(batch.keys)
        seen |= set(batch.labels.tolist())
    assert seen == set(range(endless.samples_per_epoch)) == set(range(47))


@pytest.mark.parametrize("stopped_after", [0, 4, 9])
def test_a_restored_loader_goes_on_bit_for_bit(shards: Path, device: str, stopped_after: int) -> None:
    whole = loader(shards, device=device)
    for _ in range(stopped_after):
        next(whole)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    restored = loader(shards, device=device, state=torch.load(file, weights_only=True))
    assert all(equal(next(whole), next(restored)) for _ in range(8))


def test_a_state_of_other_crops_is_refused_by_name(shards: Path) -> None:
    state = loader(shards).state_dict()
    with pytest.raises(LoaderStateError, match=r"crops was .*, is "):
        loader(shards, replace(SMALL, flip_probability=0.0), state=state)


def test_a_label_column_must_be_named_and_be_there(shards: Path) -> None:
    with pytest.raises(ShardError, match="no label column 'species'"):
        loader(shards, label="species")
    with pytest.raises(ValueError, match="need the name of a label column"):
        loader(shards, label=None)


@pytest.mark.parametrize(
    ("crops", "named"),
    [
        (CropSettings(crop_scale=(0.5, 0.2)), "crop_scale 0.5 0.2"),
        (CropSettings(crop_scale=(0.0, 1.0)), "crop_scale 0.0 1.0"),
        (CropSettings(crop_ratio=(2.0, 1.0)), "crop_ratio"),
        (CropSettings(flip_probability=1.5), "flip_probability 1.5"),
    ],
)
def test_crops_that_cannot_be_made_are_refused_by_name(shards: Path, crops: CropSettings, named: str) -> None:
    with pytest.raises(AugmentationError, match=named):
        loader(shards, crops)


def test_boxes_and_flips_have_the_distributions_of_torchvision(tmp_path: Path) -> None:
    """Read the box of a crop from its pixels: red increases to the right and green downwards."""
    y, x = np.mgrid[0:75, 0:100]
    pixels = np.stack([40 + 1.6 * x, 40 + 2.0 * y, np.full_like(x, 128)], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    write_split(tmp_path, "train", [buffer.getvalue()] * 20, per_shard=(20,))
    endless = loader(tmp_path, CropSettings(size=24), batch_size=500)
    images = torch.cat([next(endless).images.clone() for _ in range(6)]).double().numpy()
    red, green = images[..., 0].mean(1), images[..., 1].mean(2)
    # The centres of the outermost pixels are half a pixel of the crop inside its box.
    slope = (red[:, -2] - red[:, 1]) / 21
    flipped = slope < 0
    assert binomtest(int(flipped.sum()), len(flipped), 0.5).pvalue > 1e-4
    width = abs(slope) * 24 / 1.6
    height = (green[:, -2] - green[:, 1]) / 21 * 24 / 2.0
    centre_x, centre_y = (red.mean(1) - 40) / 1.6, (green.mean(1) - 40) / 2.0
    torch.manual_seed(0)
    empty = torch.empty(3, 75, 100)
    boxes = [RandomResizedCrop.get_params(empty, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    top, left, tall, wide = np.array(boxes, dtype=float).T
    # Sampled boxes are whole pixels, but boxes read from colours are not: add the reading error to the expected ones.
    noise = np.random.default_rng(0).uniform(-0.7, 0.7, (4, 3000))
    expected = (wide, tall, left + wide / 2 - 0.5, top + tall / 2 - 0.5)
    for ours, torchvisions, spread in zip((width, height, centre_x, centre_y), expected, noise, strict=True):
        assert ks_2samp(ours, torchvisions + spread).statistic < 0.06
    assert ks_2samp(width * height, wide * tall).statistic < 0.06


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_the_resize_is_pillows(squares: tuple[Path, list[bytes]], device: str, interpolation: Any, flip: bool) -> None:
    folder, contents = squares
    filters = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}
    crops = replace(WHOLE, interpolation=interpolation, flip_probability=float(flip))
    for made, content in zip(of_all_squares(folder, crops, device=device), contents, strict=True):
        expected = np.array(Image.open(io.BytesIO(content)).resize((48, 48), filters[interpolation]))
        expected = expected[:, ::-1].copy() if flip else expected
        error = (made.float() - torch.from_numpy(expected).float()).abs().mean()
        assert error <= (0.6 if device == "cpu" else 1.5)


def test_colour_ops_are_done_to_the_crop(squares: tuple[Path, list[bytes]], device: str) -> None:
    folder, _ = squares
    plain = of_all_squares(folder, WHOLE, device=device)
    for op in ("grayscale", "solarize"):
        changed = of_all_squares(folder, replace(WHOLE, photometric=SINGLE_OP[op]), device=device)
        params = torch.tensor(IDENTITY).repeat(12, 1)
        params[:, PHOTOMETRIC_FIELDS.index(op)] = 1.0
        expected = replay.apply_photometric(plain, params, "linear")
        assert (changed.float() - expected.float()).abs().mean() <= 0.01
    jittered = of_all_squares(folder, replace(WHOLE, photometric=SINGLE_OP["brightness"]), device=device)
    factors = jittered.float().mean((1, 2, 3)) / plain.float().mean((1, 2, 3))
    assert factors.std() > 0.05
