"""The same two views by FFCV, as far as it goes: it has no hue, grayscale, blur or solarize, so it does less work.

Its dataset holds the shards' own JPEGs, byte for byte (FFCV would encode them anew). Both views share its decode, crop
and flip. Needs the package ffcv: data_contenders.py says how it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from baselines.stored import Place, places
from ffcv.fields import RGBImageField
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.transforms import RandomBrightness, RandomContrast, RandomHorizontalFlip, RandomSaturation, ToTensor
from ffcv.writer import DatasetWriter

from dali_pipelines.augmentation import Photometric, Views


class StoredJpeg(RGBImageField):
    """An image field that writes JPEGs as they are."""

    def encode(self, destination: Any, image: bytes, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["height"], destination["width"] = simplejpeg.decode_jpeg_header(image)[:2]
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, np.uint8)


class StoredImages:
    """The indexable object that FFCV's writer reads: item i is a tuple of one JPEG."""

    def __init__(self, images: list[Place]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[bytes]:
        return (self._images[index].read(),)


class Copy(Operation):
    """FFCV's colour ops write in place: what two branches share must be copied first."""

    def generate_code(self) -> Callable[..., Any]:
        def copy(images: Any, destination: Any) -> Any:
            destination[: len(images)] = images
            return destination[: len(images)]

        return copy

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        return replace(previous_state, jit_mode=True), AllocationQuery(previous_state.shape, previous_state.dtype)


def write_dataset(folder: Path, split: str, file: Path, workers: int) -> None:
    """Make FFCV's dataset out of the shards, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    DatasetWriter(str(unfinished), {"image": StoredJpeg()}, num_workers=workers).from_indexed_dataset(
        StoredImages(places(folder, split))
    )
    unfinished.rename(file)


def batches(file: Path, views: Views, batch_size: int, threads: int) -> Iterator[int]:
    """Endless: the number of images of each batch, once it is there."""
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


def colours(spec: Photometric) -> list[Operation]:
    """The jitter that FFCV has, each op drawn by itself."""
    p = spec.jitter_probability
    jitter = [
        RandomBrightness(spec.brightness, p),
        RandomContrast(spec.contrast, p),
        RandomSaturation(spec.saturation, p),
    ]
    return [Copy(), *(jitter if p > 0 else []), ToTensor()]
