"""Evaluation runs models under autocast; the pictures it makes must not change with it."""

import pytest
import torch

from dali_pipelines.augmentation import SCENARIOS, ColourDefinition
from dali_pipelines.replay import draw_photometric, photometric


@pytest.mark.parametrize("colour", ["linear", "torchvision"])
def test_pictures_are_the_same_under_autocast(colour: ColourDefinition) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 16, 16, 3), dtype=torch.uint8, generator=generator)
    params = draw_photometric(SCENARIOS["more_destructive"].source, 32, generator)
    exact = photometric(images, params, colour)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(photometric(images, params, colour), exact)
