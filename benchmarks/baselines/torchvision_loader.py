"""torchvision baseline: the same two views by transforms and a DataLoader, from the same tars.

Two common variants: `pil` (Pillow decode, transforms on Pillow images) and `tensor` (torchvision.io decode, v2
transforms on uint8 tensors).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from baselines.jpeg_decode import stored_images
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from dali_pipelines.augmentations import OPS, SOLARIZE_THRESHOLD, PhotometricConfig
from dali_pipelines.views import Views
from iwm.config import ConfigError

Variant = Literal["pil", "tensor"]

COLOR_JITTER = ("brightness", "contrast", "saturation", "hue")
"""Arguments of torchvision's ColorJitter."""


class TwoViewTransforms:
    """Transform from a decoded image to source and target, uint8 [3, size, size]: shared crop and flip, own colours."""

    def __init__(self, views: Views, variant: Variant) -> None:
        self._crop = v2.Compose(
            [
                v2.RandomResizedCrop(views.size, scale=views.crop_scale, ratio=views.crop_ratio, antialias=True),
                v2.RandomHorizontalFlip(views.flip_probability),
            ]
        )
        self._target = colours(views.target, variant)
        self._source = colours(views.source, variant)

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        cropped = self._crop(image)
        return self._source(cropped), self._target(cropped)


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Dataset whose item i is source and target of sample i, uint8 [3, size, size]."""

    def __init__(self, folder: Path, split: str, views: Views, variant: Variant) -> None:
        self._places = stored_images(folder, split)
        self._decode: Callable[[bytes], Any] = {"pil": decode_pil, "tensor": decode_tensor}[variant]
        self._views = TwoViewTransforms(views, variant)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._views(self._decode(self._places[index].read()))


def decode_pil(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def decode_tensor(content: bytes) -> UInt8[Tensor, "3 h w"]:
    image: Tensor = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image


def colours(spec: PhotometricConfig, variant: Variant) -> Callable[[Any], UInt8[Tensor, "3 h w"]]:
    """Return one view's colour transforms; those of probability 0 are left out."""
    jitter = v2.ColorJitter(**{name: getattr(spec, name) for name in COLOR_JITTER})
    # Pillow's blur is the usual choice for Pillow images, and far cheaper there than torchvision's. torchvision's blur
    # needs one kernel size, which is that of the largest sigma.
    taps = 2 * int(np.ceil(3 * spec.blur_sigma[1])) + 1
    blur = PillowBlur(spec.blur_sigma) if variant == "pil" else v2.GaussianBlur(taps, spec.blur_sigma)
    destructive = {
        "grayscale": v2.Grayscale(num_output_channels=3),
        "blur": blur,
        "solarize": v2.RandomSolarize(SOLARIZE_THRESHOLD, p=1.0),
    }
    drawn = [op for op in OPS if spec.probability(op) > 0 and (op.kind == "destructive" or getattr(spec, op.name) > 0)]
    if lacking := [op.name for op in drawn if op.name not in (*COLOR_JITTER, *destructive)]:
        raise ConfigError(f"views: torchvision's loader here has no {', '.join(lacking)}; set it to 0 to compare")
    steps = [(spec.jitter_probability, jitter)]
    steps += [(spec.probability(op), destructive[op.name]) for op in drawn if op.kind == "destructive"]
    transforms = [v2.RandomApply([transform], p=probability) for probability, transform in steps if probability > 0]
    compose: Callable[[Any], Tensor] = v2.Compose([*transforms, v2.ToImage()])
    return compose


class PillowBlur(torch.nn.Module):
    """Pillow's Gaussian blur with a uniformly sampled sigma, as in I-JEPA's transforms."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self._sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(()).uniform_(*self._sigma).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))


def batches(folder: Path, split: str, views: Views, variant: Variant, batch_size: int, workers: int) -> Iterator[int]:
    """Yield the number of images of each batch when it is ready, endlessly."""
    dataset = TwoViews(folder, split, views, variant)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        # Without epochs, because the stall at each epoch's end would weigh more in a small set than in a large one.
        sampler=RandomSampler(dataset, replacement=True, num_samples=2**40),
        num_workers=workers,
        worker_init_fn=one_thread,
    )
    for source, _ in loader:
        yield len(source)


def one_thread(worker: int) -> None:
    """Limit a worker to one torch thread, because the worker processes already use all cores."""
    torch.set_num_threads(1)
