"""Random erasing, mixup, cutmix and label smoothing of a batch, by timm (paper, A.2)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from dali_pipelines.seeds import derive_seeds
from iwm.config import ConfigError
from iwm.downstream.settings import MixupSettings
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.packing import copy_to_device


def apply_mixup(
    images: UInt8[Tensor, "b h w 3"],
    labels: Int64[Tensor, " b"],
    classes: int,
    mixing: MixupSettings,
    *,
    seed: int,
    pass_index: int,
    rank: int,
) -> tuple[UInt8[Tensor, "b h w 3"] | Float[Tensor, "b h w 3"], Float[Tensor, "b c"]]:
    """Return augmented images and soft targets: erased, then mixed with the batch in reverse order, as in timm and MAE.

    Pixels are grey levels: unchanged uint8 where nothing is erased or mixed, otherwise float. Erased pixels may be
    outside 0 to 255: they are standard normal noise in pixels normalised by ImageNet's mean and standard deviation,
    whatever the encoder's own are. Targets sum to 1. All random values are a function of (seed, pass_index, rank). The
    host does not wait for the device. Raises ConfigError for an odd batch that must be mixed.
    """
    if not (mixing.random_erasing or mixing.mixes):
        return images, mixup_target(labels, classes, smoothing=mixing.label_smoothing)
    if mixing.mixes and len(images) % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a pass, and {len(images)} images are an odd number; use an even "
            "--batch-size and --micro-batch-size, or --mixup.mixup 0 --mixup.cutmix 0"
        )
    with _seeded(images.device, seed, pass_index, rank):
        pixels = _erased(images, mixing) if mixing.random_erasing else images.float()
        if not mixing.mixes:
            return pixels, mixup_target(labels, classes, smoothing=mixing.label_smoothing)
        mixup = Mixup(mixing.mixup, mixing.cutmix, label_smoothing=mixing.label_smoothing, num_classes=classes)
        mixed, targets = mixup(pixels.permute(0, 3, 1, 2), labels)
    return mixed.permute(0, 2, 3, 1), targets


def _erased(images: UInt8[Tensor, "b h w 3"], mixing: MixupSettings) -> Float[Tensor, "b h w 3"]:
    mean, std = (copy_to_device(255 * torch.tensor(values), images.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    erase = RandomErasing(mixing.random_erasing, mode="pixel", device=images.device)
    normalised = erase(((images - mean) / std).permute(0, 3, 1, 2))
    return normalised.permute(0, 2, 3, 1) * std + mean


@contextmanager
def _seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch, which timm samples from; restore them at the end."""
    python, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002  # timm samples from this generator
    seeds = derive_seeds(3, *numbers, bits=32)
    on_gpu = device.type == "cuda"
    torchs = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    before = torchs.get_state()
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002  # as above
    torchs.manual_seed(seeds[2])
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002  # as above
        torchs.set_state(before)
