"""Evaluation loaders: one ordered pass over a split, as centre crops or full images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dali_pipelines.crops import Interpolation
from dali_pipelines.decoder import DECODER, Decoder
from dali_pipelines.outputs import SampleKeys, parse_labels, pipeline_options
from dali_pipelines.pipelines import centre_crops, full_images
from dali_pipelines.reader import open_source
from dali_pipelines.staging import ordered_outputs
from shards.split_part import SplitPart


class ValidationBatch(NamedTuple):
    """Centre crops of consecutive samples, on the pipeline's device, in DALI's memory as in ViewBatch."""

    images: UInt8[Tensor, "b h w 3"]
    labels: Int64[Tensor, " b"] | None
    """Class indices; None where the loader has no label column."""
    keys: SampleKeys


class ValidationLoader:
    """One pass over a split in the order of its shards: every sample on one rank, with a smaller last batch if needed.

    Views as in A.2: shorter side resized to ceil(size · 256 / 224), then a centre crop of `size`. Each `iter` is a new
    pass. Raises ShardError like ViewLoader.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        size: int = 224,
        batch_size: int,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 4,
        prefetch_queue_depth: int = 2,
        label: str | None = None,
        part: SplitPart | None = None,
        interpolation: Interpolation = "linear",
        decoder: Decoder = DECODER,
    ) -> None:
        """Open the shards. part: part of the split; None: all of it. interpolation: that of the resize."""
        options = pipeline_options(
            device,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch_queue_depth=prefetch_queue_depth,
            decoder=decoder,
        )
        self._source = open_source(folder, split, label=label, rank=rank, world_size=world_size, part=part)
        self._batch_size = batch_size
        self.samples = self._source.samples
        """Number of this rank's samples."""
        self._outputs = lambda: ordered_outputs(
            self._source,
            lambda: centre_crops(self._source, size, interpolation=interpolation, **options),
            batch_size,
            prefetch_queue_depth,
        )

    def __len__(self) -> int:
        """Return the number of batches of one pass on this rank."""
        return -(-self.samples // self._batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        starts = range(0, self.samples, self._batch_size)
        for start, (images, source_info, *codes) in zip(starts, self._outputs(), strict=False):
            valid = min(self._batch_size, self.samples - start)
            keys, labels = SampleKeys(source_info[:valid]), None
            if codes:
                labels = parse_labels(codes[0][:valid], keys, self._source).to(images.device, non_blocking=True)
            yield ValidationBatch(images[:valid], labels, keys)


class FullImage(NamedTuple):
    """A whole image and its mask, on the pipeline's device, in DALI's memory as in ViewBatch."""

    image: UInt8[Tensor, "h w 3"]
    mask: UInt8[Tensor, "h w"]
    key: str


class FullImageLoader:
    """One pass over a split's images and masks, one at a time, in the order of its shards: each on one rank.

    Each `iter` is a new pass. Raises ShardError like SegmentationLoader.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 4,
        prefetch_queue_depth: int = 2,
        part: SplitPart | None = None,
        decoder: Decoder = DECODER,
    ) -> None:
        """Open the shards. part: part of the split; None: all of it."""
        options = pipeline_options(
            device,
            batch_size=1,  # images of one batch would need the same size
            num_threads=num_threads,
            prefetch_queue_depth=prefetch_queue_depth,
            decoder=decoder,
        )
        self._source = open_source(folder, split, masks=True, rank=rank, world_size=world_size, part=part)
        self._outputs = lambda: ordered_outputs(
            self._source, lambda: full_images(self._source, **options), 1, prefetch_queue_depth
        )

    def __len__(self) -> int:
        """Return the number of images of one pass on this rank."""
        return self._source.samples

    def __iter__(self) -> Iterator[FullImage]:
        for _, (image, mask, source_info) in zip(range(len(self)), self._outputs(), strict=False):
            yield FullImage(image[0], mask[0, ..., 0], SampleKeys(source_info)[0])
