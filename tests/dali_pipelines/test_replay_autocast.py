"""Replay under autocast: the images must not change, although evaluation runs models under it."""

import pytest
import torch

from dali_pipelines.augmentations import JitterImpl
from dali_pipelines.replay import apply_photometric, sample_photometric
from dali_pipelines.views import SCENARIOS


@pytest.mark.parametrize("colour", ["linear", "torchvision"])
def test_pictures_are_the_same_under_autocast(colour: JitterImpl) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 16, 16, 3), dtype=torch.uint8, generator=generator)
    params = sample_photometric(SCENARIOS["more_destructive"].source, 32, generator)
    exact = apply_photometric(images, params, colour)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_photometric(images, params, colour), exact)
