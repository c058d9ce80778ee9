"""The torch replay, given the written params, makes what the DALI pipelines made."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipeline_shards import photographs_and_noise
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dali_pipelines import photometric as dali_photometric
from dali_pipelines import replay
from dali_pipelines.augmentation import (
    GEOMETRY,
    NO_COLOUR,
    ONE_OP,
    PHOTOMETRIC_FIELDS,
    SOURCE,
    TARGET,
    ColourDefinition,
    Photometric,
    Views,
)
from dali_pipelines.loader import Batch, ViewLoader

STILL = replace(NO_COLOUR, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
OPS = {
    **ONE_OP,
    "together": Photometric(),
    "together always": Photometric(1.0, 0.5, 0.5, 0.4, 0.2, 0.5, 0.5, (0.1, 2.0), 0.5),
}
DEFINITIONS: tuple[ColourDefinition, ...] = ("linear", "torchvision")


def one_batch(shards: Path, device: str, source: Photometric, colour: ColourDefinition = "linear") -> Batch:
    """All 47 images, the target left without colour ops: it is what the source was made from."""
    views = Views(size=96, source=source, target=NO_COLOUR, colour=colour)
    return next(ViewLoader(shards, "train", views, batch_size=47, seed=3, device=device, threads=1, label="row"))


def error(made: Tensor, expected: Tensor) -> Tensor:
    """Mean absolute difference in grey levels, per image."""
    return (made.float() - expected.float()).abs().mean((1, 2, 3))


@pytest.mark.parametrize("colour", DEFINITIONS)
@pytest.mark.parametrize("op", OPS)
def test_replay_of_the_written_params_gives_the_view_within_a_grey_level(
    shards: Path, device: str, op: str, colour: ColourDefinition
) -> None:
    batch = one_batch(shards, device, OPS[op], colour)
    made = replay.photometric(batch.target, batch.params[:, SOURCE], colour)
    assert not torch.equal(batch.source, batch.target)
    assert error(made, batch.source).mean() <= (0.1 if device == "cpu" else 1.0)
    assert error(made, batch.source).max() <= 1.0


def test_grayscale_and_solarize_are_exact(shards: Path, device: str) -> None:
    for op in ("grayscale", "solarize"):
        batch = one_batch(shards, device, OPS[op])
        made = replay.photometric(batch.target, batch.params[:, SOURCE], "linear")
        # Luma sums that end in .5 exactly may round either way; nothing else may differ.
        assert (made.int() - batch.source.int()).abs().max() <= (1 if op == "grayscale" else 0)
        assert (made != batch.source).float().mean() <= (1e-3 if op == "grayscale" else 0)
    assert torch.equal(made, torch.where(batch.target < 128, batch.target, 255 - batch.target))


def test_both_views_replay_when_augmentations_are_symmetric(shards: Path, device: str) -> None:
    views = Views(size=96, source=OPS["together always"], target=OPS["together always"])
    batch = next(ViewLoader(shards, "train", views, batch_size=47, seed=3, device=device, threads=1, label="row"))
    plain = replay.crop(decoded(batch), batch.params[:, GEOMETRY], 96)
    for view, columns in ((batch.source, SOURCE), (batch.target, TARGET)):
        made = replay.photometric(plain.to(device), batch.params[:, columns], "linear")
        assert error(made, view).mean() <= 1.0
    assert (batch.params[:, SOURCE] != batch.params[:, TARGET]).any(0).all()


@pytest.mark.parametrize("colour", DEFINITIONS)
def test_a_view_without_colour_ops_is_the_crop_of_the_written_box(
    shards: Path, device: str, colour: ColourDefinition
) -> None:
    batch = one_batch(shards, device, STILL, colour)
    made = replay.crop(decoded(batch), batch.params[:, GEOMETRY], 96).to(device)
    assert torch.equal(batch.source, batch.target)
    # The boxes are whole pixels, so a box or flip that is off by anything would show as tens of grey levels on noise.
    assert error(made, batch.target).max() <= (0.1 if device == "cpu" else 1.5)
    assert 0 < batch.params[:, 6].sum() < 47


@pytest.mark.parametrize("ratio", [(1.9, 2.0), (0.5, 0.55)])
def test_boxes_far_from_square_are_resized_alike(shards: Path, device: str, ratio: tuple[float, float]) -> None:
    """Wide ones are resized to more columns than are kept on a CPU; none of those may show."""
    views = Views(size=40, crop_scale=(0.3, 0.45), crop_ratio=ratio, source=STILL, target=STILL)
    batch = next(ViewLoader(shards, "train", views, batch_size=47, seed=3, device=device, threads=1, label="row"))
    made = replay.crop(decoded(batch), batch.params[:, GEOMETRY], 40).to(device)
    # Shrunk so far, DALI's tabulated filter and torch's differ a little; on noise a wrong column differs by tens.
    assert error(made, batch.target).max() <= (0.5 if device == "cpu" else 1.5)


def decoded(batch: Batch) -> list[Tensor]:
    """The batch's whole images as Pillow decodes them, found by their label column `row`."""
    assert batch.label is not None
    images = photographs_and_noise(47)
    return [tv.pil_to_tensor(Image.open(io.BytesIO(images[i]))).permute(1, 2, 0) for i in batch.label.tolist()]


def torchvision_jitter(image: Tensor, params: list[float]) -> Tensor:
    """torchvision's own functions on the uint8 tensor, in the fixed order."""
    brightness, contrast, saturation, hue = params[:4]
    image = tv.adjust_contrast(tv.adjust_brightness(image.permute(2, 0, 1), brightness), contrast)
    return tv.adjust_hue(tv.adjust_saturation(image, saturation), hue).permute(1, 2, 0)


@pytest.mark.parametrize("op", ["brightness", "contrast", "saturation", "hue", "together"])
def test_the_torchvision_definition_is_torchvisions_own_jitter(shards: Path, device: str, op: str) -> None:
    spec = replace(OPS[op], grayscale_probability=0.0, blur_probability=0.0, solarize_probability=0.0)
    batch = one_batch(shards, device, spec, "torchvision")
    rows = batch.params[:, SOURCE].tolist()
    expected = [torchvision_jitter(x, row) for x, row in zip(batch.target.cpu(), rows, strict=True)]
    assert error(batch.source.cpu(), torch.stack(expected)).mean() <= 0.5


def test_the_linear_definition_is_near_torchvisions(shards: Path) -> None:
    spec = replace(STILL, jitter_probability=1.0, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    batch = one_batch(shards, "cpu", spec, "linear")
    rows = batch.params[:, SOURCE].tolist()
    expected = [torchvision_jitter(x, row) for x, row in zip(batch.target, rows, strict=True)]
    assert error(batch.source, torch.stack(expected)).mean() <= 8.0


def test_the_gpus_matrix_and_the_cpus_filter_turn_colours_alike(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both operators run on CPU, so that this holds where there is no GPU to try the other on."""
    by_filter = one_batch(shards, "cpu", OPS["together always"])
    monkeypatch.setattr(dali_photometric, "_jitter_on_planes", dali_photometric._jitter_on_pixels)
    by_matrix = one_batch(shards, "cpu", OPS["together always"])
    assert torch.equal(by_filter.params, by_matrix.params)
    assert error(by_filter.source, by_matrix.source).max() <= 0.05


def test_grayscale_is_pillows(shards: Path) -> None:
    batch = one_batch(shards, "cpu", OPS["grayscale"])
    expected = [
        tv.pil_to_tensor(tv.to_pil_image(x.permute(2, 0, 1)).convert("L").convert("RGB")).permute(1, 2, 0)
        for x in batch.target
    ]
    assert error(batch.source, torch.stack(expected)).max() <= 0.01


def test_solarize_is_torchvisions(shards: Path) -> None:
    batch = one_batch(shards, "cpu", OPS["solarize"])
    assert torch.equal(batch.source, tv.solarize(batch.target, 128))


def test_blur_is_torchvisions_gaussian_of_the_same_taps(shards: Path) -> None:
    batch = one_batch(shards, "cpu", OPS["blur"])
    for target, source, params in zip(batch.target, batch.source, batch.params[:, SOURCE], strict=True):
        sigma = params[PHOTOMETRIC_FIELDS.index("blur_sigma")].item()
        taps = 2 * int(torch.tensor(3 * sigma).ceil()) + 1
        expected = tv.gaussian_blur(target.permute(2, 0, 1), [taps, taps], [sigma, sigma]).permute(1, 2, 0)
        assert error(source[None], expected[None]).item() <= 0.6


def test_identity_params_leave_images_as_they_are() -> None:
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    nothing = replay.draw_photometric(NO_COLOUR, 2, torch.Generator())
    for colour in DEFINITIONS:
        assert torch.equal(replay.photometric(images, nothing, colour), images)
