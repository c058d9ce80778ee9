"""The validation loader: every sample once, in order, with torchvision's resize and centre crop."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipeline_shards import photographs_and_noise
from torchvision.transforms.v2 import functional as tv

from dali_pipelines.crops import Interpolation
from dali_pipelines.replay import resized_centre_crop
from dali_pipelines.validation_loader import ValidationLoader


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_pass_has_every_sample_once_over_the_ranks_in_order(shards: Path, world_size: int) -> None:
    loaders = [
        ValidationLoader(
            shards, "train", size=32, batch_size=6, rank=r, world_size=world_size, num_threads=1, label="row"
        )
        for r in range(world_size)
    ]
    for _ in range(2):
        keys: list[str] = []
        for loader in loaders:
            batches = list(loader)
            assert len(batches) == len(loader)
            assert all(len(batch.images) == len(batch.keys) == 6 for batch in batches[:-1])
            assert 1 <= len(batches[-1].images) == len(batches[-1].keys) <= 6
            for batch in batches:
                assert batch.labels is not None
                assert [f"train{row:06d}" for row in batch.labels.tolist()] == list(batch.keys)
                keys += batch.keys
        assert keys == [f"train{i:06d}" for i in range(47)]


def test_a_pass_that_was_broken_off_does_not_change_the_next(shards: Path) -> None:
    loader = ValidationLoader(shards, "train", size=32, batch_size=6, num_threads=1)
    next(iter(loader))
    assert [key for batch in loader for key in batch.keys][:2] == ["train000000", "train000001"]


def test_images_are_resized_and_cropped_as_torchvision_does(shards: Path, device: str) -> None:
    loader = ValidationLoader(shards, "train", size=56, batch_size=47, num_threads=1, device=device)
    (batch,) = loader
    assert batch.labels is None
    assert batch.images.dtype == torch.uint8
    for made, content in zip(batch.images.cpu(), photographs_and_noise(47), strict=True):
        image = tv.pil_to_tensor(Image.open(io.BytesIO(content)))
        # 256 / 224 of 56 is 64.
        expected = tv.center_crop(tv.resize(image, [64], antialias=True), [56, 56]).permute(1, 2, 0)
        assert (made.float() - expected.float()).abs().mean() <= (1.0 if device == "cpu" else 2.0)


@pytest.mark.parametrize(
    ("interpolation", "filter_of_pillow"), [("linear", Image.Resampling.BILINEAR), ("cubic", Image.Resampling.BICUBIC)]
)
def test_images_are_resized_as_pillow_does(
    shards: Path, device: str, interpolation: Interpolation, filter_of_pillow: Image.Resampling
) -> None:
    """timm and MAE resize with Pillow. The two filters are 0.7 to 4 grey levels apart on these images."""
    loader = ValidationLoader(
        shards, "train", size=56, batch_size=47, num_threads=1, device=device, interpolation=interpolation
    )
    (batch,) = loader
    for made, content in zip(batch.images.cpu(), photographs_and_noise(47), strict=True):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        width, height = (side * 64 // min(image.size) for side in image.size)
        resized = tv.pil_to_tensor(image.resize((width, height), filter_of_pillow))
        expected = tv.center_crop(resized, [56, 56]).permute(1, 2, 0)
        assert (made.float() - expected.float()).abs().mean() <= (0.35 if device == "cpu" else 2.0)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("size", [32, 56, 128, 224])
def test_torch_makes_the_same_crops_within_a_grey_level(
    shards: Path, device: str, size: int, interpolation: Interpolation
) -> None:
    """Bound on the difference between inference (iwm/export/images.py) and evaluation: larger and smaller images."""
    (batch,) = ValidationLoader(
        shards, "train", size=size, batch_size=47, num_threads=1, device=device, interpolation=interpolation
    )
    for made, content in zip(batch.images, photographs_and_noise(47), strict=True):
        image = tv.pil_to_tensor(Image.open(io.BytesIO(content))).permute(1, 2, 0)[None].to(device)
        difference = (resized_centre_crop(image, size, interpolation)[0].int() - made.int()).abs().float()
        if device == "cpu":
            assert difference.max() <= 1
            assert (difference > 0).float().mean() <= {"linear": 0.002, "cubic": 0.03}[interpolation]
        else:
            assert difference.mean() <= 2.0  # nvJPEG decodes otherwise than libjpeg
