"""What the DALI pipeline is compared with: the same two views by torchvision and a DataLoader, from the same tars.

Two variants, as people write them: `pil` (Pillow decode, transforms on Pillow images) and `tensor` (torchvision.io
decode, v2 transforms on uint8 tensors).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from baselines.stored import places
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from dali_pipelines.augmentation import SOLARIZE_THRESHOLD, Photometric, Views

Variant = Literal["pil", "tensor"]


class TwoViewTransforms:
    """From a decoded image to source and target, uint8 [3, size, size]: one crop and flip, then each one's colours."""

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
    """Item i: source and target, uint8 [3, size, size], of sample i."""

    def __init__(self, folder: Path, split: str, views: Views, variant: Variant) -> None:
        self._places = places(folder, split)
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


def colours(spec: Photometric, variant: Variant) -> Callable[[Any], UInt8[Tensor, "3 h w"]]:
    """One view's transforms; those that cannot happen are left out."""
    strengths = {"brightness": spec.brightness, "contrast": spec.contrast}
    jitter = v2.ColorJitter(**strengths, saturation=spec.saturation, hue=spec.hue)
    # Pillow's blur is what people use on Pillow images, and far cheaper there than torchvision's. The taps of the other
    # are those of the widest sigma, as its interface demands.
    taps = 2 * int(np.ceil(3 * spec.blur_sigma[1])) + 1
    blur = PillowBlur(spec.blur_sigma) if variant == "pil" else v2.GaussianBlur(taps, spec.blur_sigma)
    steps = [
        (spec.jitter_probability, jitter),
        (spec.grayscale_probability, v2.Grayscale(num_output_channels=3)),
        (spec.blur_probability, blur),
        (spec.solarize_probability, v2.RandomSolarize(SOLARIZE_THRESHOLD, p=1.0)),
    ]
    transforms = [v2.RandomApply([transform], p=probability) for probability, transform in steps if probability > 0]
    compose: Callable[[Any], Tensor] = v2.Compose([*transforms, v2.ToImage()])
    return compose


class PillowBlur(torch.nn.Module):
    """Pillow's Gaussian blur with a sigma drawn uniformly, as I-JEPA's transforms have it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self._sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(()).uniform_(*self._sigma).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))


def batches(folder: Path, split: str, views: Views, variant: Variant, batch_size: int, workers: int) -> Iterator[int]:
    """Endless: the number of images of each batch, once it is there."""
    dataset = TwoViews(folder, split, views, variant)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        # Without epochs: their ends would cost a small set a stall that a large one hardly has.
        sampler=RandomSampler(dataset, replacement=True, num_samples=2**40),
        num_workers=workers,
        worker_init_fn=one_thread,
    )
    for source, _ in loader:
        yield len(source)


def one_thread(worker: int) -> None:
    """Workers are the parallelism; torch's own threads inside them would only get in each other's way."""
    torch.set_num_threads(1)
