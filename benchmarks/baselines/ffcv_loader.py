"""FFCV baseline for the two views, without hue, grayscale, blur and solarize.

FFCV lacks these ops, so it does less work where the views use them. Its dataset holds the shards' own JPEGs, byte for
byte (FFCV would encode them again). Both views share decode, crop and flip. It needs the package ffcv (loaders.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from baselines.jpeg_decode import StoredImage, stored_images
from ffcv.fields import RGBImageField
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.transforms import RandomBrightness, RandomContrast, RandomHorizontalFlip, RandomSaturation, ToTensor
from ffcv.writer import DatasetWriter

from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.views import Views


class StoredJpeg(RGBImageField):
    """Image field that stores JPEGs unchanged."""

    def encode(self, destination: Any, image: bytes, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["height"], destination["width"] = simplejpeg.decode_jpeg_header(image)[:2]
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, np.uint8)


class StoredImages:
    """Indexable input of FFCV's writer: item i is a tuple of one JPEG."""

    def __init__(self, images: list[StoredImage]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[bytes]:
        return (self._images[index].read(),)


class Copy(Operation):
    """Copy of the images. FFCV's colour ops work in place, so shared inputs of two branches must be copied first."""

    def generate_code(self) -> Callable[..., Any]:
        def copy(images: Any, destination: Any) -> Any:
            destination[: len(images)] = images
            return destination[: len(images)]

        return copy

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        return replace(previous_state, jit_mode=True), AllocationQuery(previous_state.shape, previous_state.dtype)


def write_dataset(folder: Path, split: str, file: Path, workers: int) -> None:
    """Write an FFCV dataset of the shards atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    DatasetWriter(str(unfinished), {"image": StoredJpeg()}, num_workers=workers).from_indexed_dataset(
        StoredImages(stored_images(folder, split))
    )
    unfinished.rename(file)


def batches(file: Path, views: Views, batch_size: int, threads: int) -> Iterator[int]:
    """Yield the number of images of each batch when it is ready, endlessly."""
    decoder = RandomResizedCropRGBImageDecoder((views.size, views.size), views.crop_scale, views.crop_ratio)
    flip = RandomHorizontalFlip(views.flip_probability)
    loader = Loader(
        str(file),
        batch_size=batch_size,
        num_workers=threads,
        order=OrderOption.RANDOM,
        drop_last=True,
        custom_fields={"image": StoredJpeg},
        pipelines={
            "image": None,
            "source": PipelineSpec("image", decoder, [flip, *colours(views.source)]),
            "target": PipelineSpec(flip, transforms=colours(views.target)),
        },
    )
    while True:
        for source, _ in loader:
            yield len(source)


def colours(spec: PhotometricConfig) -> list[Operation]:
    """Return the jitter ops that FFCV has, each sampled independently."""
    p = spec.jitter_probability
    jitter = [
        RandomBrightness(spec.brightness, p),
        RandomContrast(spec.contrast, p),
        RandomSaturation(spec.saturation, p),
    ]
    return [Copy(), *(jitter if p > 0 else []), ToTensor()]
