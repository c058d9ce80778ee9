"""The segmentation loaders: image and mask correspond exactly after crop, flip and padding."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_shards import jpeg, photographs_and_noise, png, write_split
from scipy.stats import binomtest, kstest
from torch import Tensor

from dali_pipelines.augmentations import MEAN_COLOUR, NO_PHOTOMETRIC, SINGLE_OP, AugmentationError
from dali_pipelines.crops import SegmentationCrops
from dali_pipelines.loader import LoaderStateError, SegmentationBatch, SegmentationLoader
from dali_pipelines.validation_loader import FullImageLoader
from shards.errors import ShardError

PLAIN = SegmentationCrops(size=48, photometric=NO_PHOTOMETRIC)


def rectangles(count: int) -> list[np.ndarray]:
    """Make masks of 0 and 1 in several sizes: rectangles on background, more of them on the left."""
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(count):
        height, width = (int(n) for n in rng.integers(70, 140, 2))
        mask = np.zeros((height, width), np.uint8)
        for _ in range(6):
            top, left = int(rng.integers(0, height - 20)), int(rng.integers(0, width // 2))
            mask[top : top + int(rng.integers(10, 40)), left : left + int(rng.integers(10, 40))] ^= 1
        masks.append(mask)
    return masks


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 images that are white where their mask is 1 and black where it is 0."""
    folder = tmp_path_factory.mktemp("masked")
    masks = rectangles(40)
    images = [_sharp(np.repeat(255 * mask[..., None], 3, axis=2)) for mask in masks]
    write_split(folder, "train", images, per_shard=(11, 9, 20), masks=[png(mask) for mask in masks])
    return folder


def _sharp(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def loader(folder: Path, crops: SegmentationCrops = PLAIN, **settings: Any) -> SegmentationLoader:
    return SegmentationLoader(folder, "train", crops, **{"batch_size": 8, "seed": 5, "num_threads": 1} | settings)


def equal(a: SegmentationBatch, b: SegmentationBatch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks) and list(a.keys) == list(b.keys)


def wrong(images: Tensor, masks: Tensor) -> float:
    """Return the share of covered pixels whose mask does not match the image."""
    covered = masks != 255
    return ((images.float().mean(-1) > 127.5) != (masks == 1))[covered].float().mean().item()


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.4, 0.4), (1.0, 1.0), (2.5, 2.5)])
def test_masks_lie_on_their_images_to_the_pixel(masked: Path, device: str, scale: tuple[float, float]) -> None:
    endless = loader(masked, replace(PLAIN, scale=scale), device=device)
    batches = [next(endless) for _ in range(10)]
    images = torch.cat([batch.images.clone() for batch in batches])
    masks = torch.cat([batch.masks.clone() for batch in batches])
    assert images.shape == (80, 48, 48, 3)
    assert masks.shape == (80, 48, 48)
    assert images.dtype == masks.dtype == torch.uint8
    assert images.device.type == masks.device.type == device
    assert set(masks.unique().tolist()) <= {0, 1, 255}
    # At a third of the size, rectangles have corners and gaps of less than a pixel.
    assert wrong(images, masks) < (0.025 if scale[1] < 0.5 else 0.01)
    for axis in (1, 2):
        shifted = wrong(images.roll(1, axis)[:, 1:, 1:], masks[:, 1:, 1:])
        assert shifted > 5 * wrong(images, masks) + 0.01


def test_what_the_image_does_not_cover_is_void_and_of_mean_colour(masked: Path, device: str) -> None:
    batch = next(
        loader(
            masked, replace(PLAIN, scale=(0.4, 0.5), ignore_index=200, photometric=SINGLE_OP["solarize"]), device=device
        )
    )
    void = batch.masks == 200
    assert 0.1 < void.float().mean() < 0.9
    assert (batch.images[void] == torch.tensor(MEAN_COLOUR, device=device).byte()).all()
    for of_one in void:
        rows, columns = (~of_one).any(1), (~of_one).any(0)
        assert torch.equal(~of_one, rows[:, None] & columns[None, :])
        assert (rows.sum(), columns.sum()) == (rows.nonzero()[-1] + 1, columns.nonzero()[-1] + 1), (
            "below and to the right"
        )


def test_colour_ops_change_the_image_and_nothing_else(masked: Path) -> None:
    batch = next(loader(masked, replace(PLAIN, photometric=SINGLE_OP["solarize"]), batch_size=20))
    assert set(batch.masks.unique().tolist()) == {0, 1, 255}
    assert (batch.images[batch.masks != 255] < 128).all(), "white turned black, black stayed"
    distorted = next(loader(masked, replace(PLAIN, photometric=SegmentationCrops().photometric)))
    assert wrong(distorted.images, distorted.masks) < 0.05


def test_a_rotation_that_masks_would_not_follow_is_refused(masked: Path) -> None:
    with pytest.raises(AugmentationError, match=r"photometric.rotation: masks would not be rotated; set it to 0"):
        loader(masked, replace(PLAIN, photometric=SINGLE_OP["rotation"]))


def test_sizes_places_and_flips_are_drawn_evenly(tmp_path: Path) -> None:
    """Read the box of a crop from its pixels: red increases to the right and green downwards."""
    y, x = np.mgrid[0:100, 0:120]
    pixels = np.stack([40 + 1.4 * x, 40 + 1.6 * y, np.full_like(x, 128)], axis=-1).astype(np.uint8)
    write_split(tmp_path, "train", [_sharp(pixels)] * 20, (20,), masks=[png(np.zeros((100, 120), np.uint8))] * 20)
    endless = loader(tmp_path, replace(PLAIN, size=32, scale=(1.0, 2.0)), batch_size=500)
    images = torch.cat([next(endless).images.clone() for _ in range(4)]).double().numpy()
    across, down = images[..., 0].mean(1), images[..., 1].mean(2)
    slope = (across[:, -2] - across[:, 1]) / 29
    assert binomtest(int((slope < 0).sum()), len(slope), 0.5).pvalue > 1e-3
    width, height = 32 * abs(slope) / 1.4, 32 * (down[:, -2] - down[:, 1]) / 29 / 1.6
    # 32 pixels show 100 / shorter-side-th of the image's 100 rows: shorter = 32 * scale.
    assert kstest(100 / height, "uniform", (1.0, 1.0)).statistic < 0.06
    assert np.abs(width / height - 1).max() < 0.1
    left = across.mean(1) / 1.4 - 40 / 1.4 - (width - 1) / 2
    top = down.mean(1) / 1.6 - 40 / 1.6 - (height - 1) / 2
    for start, room in ((left, 120 - width), (top, 100 - height)):
        wide = room > 15
        assert kstest((start / room)[wide], "uniform").statistic < 0.06


def test_a_long_image_is_not_made_longer_than_four_times_the_size(tmp_path: Path) -> None:
    mask = np.zeros((20, 400), np.uint8)
    write_split(tmp_path, "train", [jpeg(np.zeros((20, 400, 3), np.uint8))] * 4, (4,), masks=[png(mask)] * 4)
    batch = next(
        loader(tmp_path, SegmentationCrops(size=32, scale=(1.0, 1.0), photometric=NO_PHOTOMETRIC), batch_size=4)
    )
    covered = batch.masks != 255
    assert covered.any(2).sum(1).tolist() == [6] * 4, "128 / 400 of 20 rows"
    assert covered.any(1).all()


@pytest.mark.parametrize("stopped_after", [0, 3, 7])
def test_a_restored_loader_goes_on_bit_for_bit(masked: Path, device: str, stopped_after: int) -> None:
    whole = loader(masked, SegmentationCrops(size=32), device=device)
    for _ in range(stopped_after):
        next(whole)
    restored = loader(masked, SegmentationCrops(size=32), device=device, state=whole.state_dict())
    assert all(equal(next(whole), next(restored)) for _ in range(6))


def test_each_epoch_has_every_sample(masked: Path) -> None:
    endless = loader(masked)
    assert (endless.batches_per_epoch, endless.samples_per_epoch) == (5, 40)
    assert {key for _ in range(5) for key in next(endless).keys} == {f"train{i:06d}" for i in range(40)}


def test_other_crops_and_shards_without_masks_are_refused(masked: Path, shards: Path) -> None:
    with pytest.raises(LoaderStateError, match=r"crops was .*, is "):
        loader(masked, replace(PLAIN, scale=(1.0, 2.0)), state=loader(masked).state_dict())
    with pytest.raises(AugmentationError, match=r"scale 2.0 0.5 must be MIN MAX with 0 < MIN <= MAX"):
        loader(masked, replace(PLAIN, scale=(2.0, 0.5)))
    with pytest.raises(AugmentationError, match="ignore_index 256"):
        loader(masked, replace(PLAIN, ignore_index=256))
    with pytest.raises(ShardError, match="'train' has no segmentation masks"):
        loader(shards)
    with pytest.raises(ShardError, match="'train' has no segmentation masks"):
        FullImageLoader(shards, "train")


@pytest.mark.parametrize("world_size", [1, 3])
def test_whole_images_come_once_in_order_at_their_own_size_with_their_masks(
    masked: Path, device: str, world_size: int
) -> None:
    ranks = [FullImageLoader(masked, "train", device=device, rank=r, world_size=world_size) for r in range(world_size)]
    expected = rectangles(40)
    for _ in range(2):
        seen = [masked_image for rank in ranks for masked_image in rank]
        assert sum(map(len, ranks)) == len(seen) == 40
        for number, (image, mask, key) in enumerate(seen):
            assert key == f"train{number:06d}"
            assert image.shape == (*expected[number].shape, 3)
            assert torch.equal(mask.cpu(), torch.from_numpy(expected[number]))
            assert wrong(image, mask) < 0.001


def test_masks_are_read_exactly_and_images_as_pillow_reads_them(tmp_path: Path, device: str) -> None:
    rng = np.random.default_rng(0)
    images, masks = photographs_and_noise(6), []
    for number, content in enumerate(images):
        width, height = Image.open(io.BytesIO(content)).size
        ids = rng.integers(0, 256 if number else 2, (height, width), dtype=np.uint8)
        ids[0] = np.arange(width) % 256
        masks.append(ids)
    write_split(tmp_path, "train", images, (6,), masks=[png(ids) for ids in masks])
    for (image, mask, _), content, ids in zip(
        FullImageLoader(tmp_path, "train", device=device), images, masks, strict=True
    ):
        assert torch.equal(mask.cpu(), torch.from_numpy(ids))
        expected = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).float()
        assert (image.cpu().float() - expected).abs().mean() <= (0.1 if device == "cpu" else 2.0)
