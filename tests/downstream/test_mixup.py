"""Erasing, mixup, cutmix and label smoothing: results, distributions, and unchanged global generators."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ks_2samp, kstest
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from iwm.config import ConfigError
from iwm.downstream.mixup import apply_mixup
from iwm.downstream.settings import MixupSettings
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.ranges import check_ranges
from tests.training.test_no_waiting import NoReads

UNLIKELY = 1e-3
CLASSES = 10
ONLY_ERASING = MixupSettings(random_erasing=1.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)


def batch(size: int = 32, count: int = 8) -> tuple[Tensor, Tensor]:
    """Return images and labels: image i has the uniform grey level 20 i and class i."""
    levels = 20 * torch.arange(count, dtype=torch.uint8)
    return levels[:, None, None, None].expand(-1, size, size, 3).contiguous(), torch.arange(count) % CLASSES


def mixed(mixing: MixupSettings, step: int, size: int = 32, **chosen: Any) -> tuple[Tensor, Tensor]:
    return apply_mixup(*batch(size), CLASSES, mixing, **{"seed": 0, "rank": 0} | chosen, pass_index=step)


def one_hot() -> Tensor:
    return torch.nn.functional.one_hot(batch()[1], CLASSES).float()


def test_nothing_to_do_leaves_the_images_as_they_are() -> None:
    images, labels = batch()
    pixels, targets = apply_mixup(images, labels, CLASSES, MixupSettings.none(), seed=0, pass_index=0, rank=0)
    assert pixels is images
    assert torch.equal(targets, one_hot())


def test_smoothing_is_torchs() -> None:
    _, targets = mixed(MixupSettings(0.0, 0.0, 0.0, 0.1), 0)
    logits = torch.randn(8, CLASSES)
    smoothed = torch.nn.functional.cross_entropy(logits, batch()[1], label_smoothing=0.1)
    assert torch.allclose(torch.nn.functional.cross_entropy(logits, targets), smoothed)


def test_mixup_blends_images_and_targets_alike_with_the_batch_turned_round() -> None:
    images, _ = batch()
    shares = []
    for step in range(400):
        pixels, targets = mixed(MixupSettings(0.0, 0.8, 0.0, 0.0), step, size=2)
        share = targets[0, 0].item()
        shares.append(share)
        expected = share * images.float() + (1 - share) * images.flip(0).float()
        assert torch.allclose(pixels, expected[:, :2, :2], atol=1e-3)
        assert torch.allclose(targets, share * one_hot() + (1 - share) * one_hot().flip(0), atol=1e-6)
    assert kstest(shares, "beta", (0.8, 0.8)).pvalue > UNLIKELY


def test_cutmix_pastes_one_box_and_weighs_targets_by_its_area() -> None:
    images, _ = batch()
    kept = []
    for step in range(400):
        pixels, targets = mixed(MixupSettings(0.0, 0.0, 1.0, 0.0), step)
        pasted = (pixels != images).all(-1)
        assert (pasted | (pixels == images).all(-1)).all()
        assert torch.equal(pixels[pasted], images.flip(0).float()[pasted])
        rows, columns = pasted.any(2), pasted.any(1)
        assert torch.equal(pasted, rows[:, :, None] & columns[:, None, :]), "a box, the same in each image"
        share = 1 - pasted[0].float().mean().item()
        assert torch.allclose(targets, share * one_hot() + (1 - share) * one_hot().flip(0), atol=1e-6)
        kept.append(share)
    np.random.seed(0)  # noqa: NPY002  # timm samples from this generator
    timms = Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=CLASSES)
    theirs = [timms(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))[1][0, 0].item() for _ in range(400)]
    assert ks_2samp(kept, theirs).pvalue > UNLIKELY


def test_with_both_each_batch_has_one_of_the_two_as_likely() -> None:
    images, _ = batch()
    cut = 0
    for step in range(400):
        pixels, targets = mixed(MixupSettings(0.0, 0.8, 1.0, 0.1), step)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        assert torch.isclose(targets[0, -1], torch.tensor(0.01)), "smoothed"
        # A blend changes all pixels; a pasted box leaves the original pixels of either image.
        cut += bool(((pixels == images) | (pixels == images.flip(0))).all())
    assert binomtest(cut, 400, 0.5).pvalue > UNLIKELY


def test_erased_boxes_are_timms_and_their_noise_is_normal_in_normalised_pixels() -> None:
    areas, tall, noise = [], [], []
    for step in range(60):
        pixels, _ = mixed(ONLY_ERASING, step, size=64)
        changed = ((pixels - batch(64)[0]).abs() > 0.01).any(-1)
        for image, where in zip(pixels, changed, strict=True):
            rows, columns = where.any(1).nonzero().flatten(), where.any(0).nonzero().flatten()
            height, width = (int(side[-1] - side[0]) + 1 for side in (rows, columns))
            assert where.sum() > 0.98 * height * width, "a box, but for noise that happens to be what was there"
            areas.append(height * width / 64**2)
            tall.append(math.log(height / width))
            noise.append(image[where])
    values = torch.cat(noise) / 255
    assert torch.allclose(values.mean(0), torch.tensor(IMAGENET_MEAN), atol=0.004)
    assert torch.allclose(values.std(0), torch.tensor(IMAGENET_STD), atol=0.004)
    assert kstest((values[:4000, 0] - IMAGENET_MEAN[0]) / IMAGENET_STD[0], "norm").pvalue > UNLIKELY
    random.seed(0)
    erase, theirs = RandomErasing(1.0, mode="const", device="cpu"), []
    for _ in range(480):
        erased = erase(torch.ones(1, 3, 64, 64))[0, 0] == 0
        theirs.append((int(erased.any(1).sum()), int(erased.any(0).sum())))
    assert ks_2samp(areas, [height * width / 64**2 for height, width in theirs]).pvalue > UNLIKELY
    assert ks_2samp(tall, [math.log(height / width) for height, width in theirs]).pvalue > UNLIKELY


def test_a_quarter_is_erased_and_the_rest_stays() -> None:
    images, _ = batch()
    erased = 0
    for step in range(100):
        pixels, _ = mixed(MixupSettings(0.25, 0.0, 0.0, 0.0), step)
        changed = (pixels - images).abs().amax((1, 2, 3)) > 0.01
        erased += int(changed.sum())
        assert torch.allclose(pixels[~changed], images[~changed].float(), atol=1e-3)
    assert binomtest(erased, 800, 0.25).pvalue > UNLIKELY


def test_draws_depend_on_seed_step_and_rank_alone() -> None:
    first = mixed(MixupSettings(), 3)
    torch.rand(5)
    random.random()
    assert all(torch.equal(a, b) for a, b in zip(first, mixed(MixupSettings(), 3), strict=True))
    for other in (mixed(MixupSettings(), 4), mixed(MixupSettings(), 3, rank=1), mixed(MixupSettings(), 3, seed=1)):
        assert not torch.equal(first[0], other[0])


def test_other_generators_go_on_as_if_nothing_was_drawn() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]  # noqa: NPY002  # timm's generator

    def begin() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002  # timm's generator
        torch.manual_seed(1)

    begin()
    expected = [*draws(), *draws()]
    begin()
    before = draws()
    mixed(MixupSettings(), 0)
    assert [*before, *draws()] == expected


def test_an_odd_batch_is_mixed_by_nobody() -> None:
    odd = batch(count=7)
    with pytest.raises(ConfigError, match="7 images are an odd number; use an even --batch-size"):
        apply_mixup(*odd, CLASSES, MixupSettings(), seed=0, pass_index=0, rank=0)
    pixels, _ = apply_mixup(*odd, CLASSES, ONLY_ERASING, seed=0, pass_index=0, rank=0)
    assert len(pixels) == 7


@pytest.mark.parametrize(
    ("mixing", "named"),
    [
        (MixupSettings(random_erasing=1.5), "--mixup.random-erasing 1.5"),
        (MixupSettings(mixup=-1.0), "--mixup.mixup"),
        (MixupSettings(label_smoothing=1.0), "--mixup.label-smoothing 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(mixing: MixupSettings, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_ranges(mixing, "--mixup.")
    check_ranges(MixupSettings())
    check_ranges(MixupSettings.none())


def test_nothing_is_read_back_from_the_device() -> None:
    images, labels = batch()
    with NoReads():
        for step in range(8):
            apply_mixup(images, labels, CLASSES, MixupSettings(), seed=0, pass_index=step, rank=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here")
def test_a_gpu_does_the_same_without_being_waited_for() -> None:
    images, labels = batch()
    on_gpu = images.cuda(), labels.cuda()
    before = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [apply_mixup(*on_gpu, CLASSES, MixupSettings(0.0), seed=0, pass_index=step, rank=0) for step in range(8)]
        apply_mixup(*on_gpu, CLASSES, MixupSettings(), seed=0, pass_index=0, rank=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for step, (pixels, targets) in enumerate(made):
        expected = apply_mixup(images, labels, CLASSES, MixupSettings(0.0), seed=0, pass_index=step, rank=0)
        assert torch.allclose(pixels.cpu(), expected[0], atol=1e-3)
        assert torch.allclose(targets.cpu(), expected[1], atol=1e-6)
