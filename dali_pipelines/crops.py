"""Settings of crops and augmentations of labelled images, for downstream training (paper, A.2).

This module imports neither torch nor DALI, so that a command can read its options before these are imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dali_pipelines.augmentations import NO_PHOTOMETRIC, AugmentationError, JitterImpl, PhotometricConfig
from dali_pipelines.views import check_crop

Interpolation = Literal["linear", "cubic"]
"""Interpolation of the resize, always antialiased. `cubic`: Pillow's bicubic (a = -0.5), which may overshoot."""

MAX_MAGNITUDE = 10.0
"""Maximum magnitude of an op of RandAugment."""


@dataclass(frozen=True)
class RandAugment:
    """Settings in a RandAugment string."""

    magnitude: int = 10
    """m: mean magnitude (0 to 10)."""
    layers: int = 2
    """n: number of ops sampled per image, with replacement."""
    probability: float = 0.5
    """p: probability that a sampled op is applied (0 to 1)."""
    std: float = 0.0
    """mstd: standard deviation of an op's magnitude, which is then clamped to 0 to 10."""
    increasing: bool = False
    """inc: every op has a stronger effect at a larger magnitude. Without it, posterize and solarize have a weaker
    effect, and the factor of the enhancing ops increases from 0.1 to 1.9."""


_SECTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "m": ("magnitude", int),
    "n": ("layers", int),
    "p": ("probability", float),
    "mstd": ("std", float),
    "inc": ("increasing", lambda digits: bool(int(digits))),
}


def parse_rand_augment(text: str) -> RandAugment:
    """Parse a string like `rand-m9-mstd0.5-inc1`. Raise AugmentationError, which names an invalid section."""
    first, *sections = text.split("-")
    if first != "rand":
        raise AugmentationError(f"rand_augment '{text}' must begin with 'rand', e.g. rand-m9-mstd0.5-inc1")
    values = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+\.?\d*)", section)
        if match is None or match[1] not in _SECTIONS:
            raise AugmentationError(
                f"rand_augment '{text}': section '{section}' must be m, n, p, mstd or inc, followed by a number"
            )
        name, number = _SECTIONS[match[1]]
        try:
            values[name] = number(match[2])
        except ValueError as error:
            raise AugmentationError(f"rand_augment '{text}': section '{section}' needs a whole number") from error
    spec = RandAugment(**values)
    if not (spec.magnitude <= MAX_MAGNITUDE and spec.probability <= 1 and spec.std <= 100):
        raise AugmentationError(f"rand_augment '{text}': m can be at most 10, p at most 1 and mstd at most 100")
    return spec


@dataclass(frozen=True)
class CropSettings:
    """Augmentations of labelled images in training. Defaults are those of the linear probe (paper, A.2)."""

    size: int = 224
    """Side of a crop (pixels)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop area, as a share of the image (0 to 1)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect (width / height), sampled log-uniformly as in torchvision."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip (0 to 1)."""
    interpolation: Interpolation = "linear"
    """Interpolation of the resize. timm, and MAE with it, uses `cubic` for finetuning."""
    photometric: PhotometricConfig = NO_PHOTOMETRIC
    """Photometric ops after the flip; the attentive probe uses those of pretraining's source view."""
    jitter_impl: JitterImpl = "linear"
    """Implementation of the jitter, as views.jitter_impl in pretraining. The run's own setting is not used."""
    rand_augment: str | None = None
    """timm's RandAugment string, for example `rand-m9-mstd0.5-inc1`, applied last. None disables it."""

    def check(self) -> None:
        """Raise AugmentationError, which names the field, where a value is out of range."""
        check_crop(self.crop_scale, self.crop_ratio, self.flip_probability)
        self.photometric.check()
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)


DISTORTION = PhotometricConfig(0.5, 32 / 255, 0.5, 0.5, 18 / 360, 0.0, 0.0, (0.1, 2.0), 0.0)
"""Strengths of MMSegmentation's PhotoMetricDistortion, with this project's order and maths. There, each of the four ops
is applied to half of the images independently; here, all four are applied to the same half."""


@dataclass(frozen=True)
class SegmentationCrops:
    """Augmentations of images with masks in training. Defaults are MMSegmentation's for ViTs with UPerNet.

    The image is resized so that its shorter side is `size` times a factor sampled from `scale`, and a square is cropped
    at a random position. MMSegmentation's cat_max_ratio (sample another square where one class covers 75%) is not
    implemented.
    """

    size: int = 224
    """Side of a crop (pixels)."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the resized shorter side, as a multiple of `size`, sampled uniformly."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip (0 to 1)."""
    photometric: PhotometricConfig = DISTORTION
    """Photometric ops of the image."""
    jitter_impl: JitterImpl = "linear"
    """Implementation of the jitter, as views.jitter_impl in pretraining. The run's own setting is not used."""
    ignore_index: int = 255
    """Class id (0 to 255, as in the shards) of pixels that are ignored; also used outside the image."""

    def check(self) -> None:
        """Raise AugmentationError, which names the field, where a value is out of range."""
        if not 0 < self.scale[0] <= self.scale[1]:
            raise AugmentationError(f"scale {self.scale[0]} {self.scale[1]} must be MIN MAX with 0 < MIN <= MAX")
        if not 0 <= self.flip_probability <= 1:
            raise AugmentationError(f"flip_probability {self.flip_probability} must be from 0 to 1")
        self.photometric.check()
        if self.photometric.rotation:
            raise AugmentationError("photometric.rotation: masks would not be rotated; set it to 0")
        if not 0 <= self.ignore_index <= 255:
            raise AugmentationError(f"ignore_index {self.ignore_index} must be from 0 to 255")


def resized_side(size: int) -> int:
    """Return the shorter side (pixels) to which a held-out image is resized before its centre crop of `size` (A.2)."""
    return math.ceil(size * 256 / 224)
