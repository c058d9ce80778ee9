"""Batches for torch, out of the DALI pipelines: endless ones for training, one ordered pass to validate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dali_pipelines.augmentation import Views
from dali_pipelines.classification import centre_crops
from dali_pipelines.crops import Crops, labelled_crops
from dali_pipelines.decoder import GPU_DECODER, GpuDecoder
from dali_pipelines.endless import EndlessLoader
from dali_pipelines.outputs import SampleKeys, backend_of, parse_labels, run
from dali_pipelines.reader import open_source
from dali_pipelines.segmentation import MaskCrops, masked_crops, whole_images
from dali_pipelines.views import two_views


class Batch(NamedTuple):
    """Two views of each image, on the pipeline's device, in DALI's memory: it is reused once the tensors are gone."""

    source: UInt8[Tensor, "b h w 3"]
    target: UInt8[Tensor, "b h w 3"]
    params: Float[Tensor, "b p"]
    """What was done, in the order of augmentation.PARAMS."""
    label: Int64[Tensor, " b"] | None
    """None where the loader was given no label column."""
    keys: SampleKeys

    def clone(self) -> Batch:
        """This batch with views and params in memory of its own."""
        return self._replace(source=self.source.clone(), target=self.target.clone(), params=self.params.clone())


class ViewLoader(EndlessLoader[Views, Batch]):
    """Endless two-view batches of a split: pretraining's."""

    pipeline = staticmethod(two_views)
    settings_name = "views"

    def batch(self, outputs: list[Tensor]) -> Batch:
        source, target, params, origins, *codes = outputs
        keys = SampleKeys(origins)
        label = parse_labels(codes[0], keys, self._source).to(params.device, non_blocking=True) if codes else None
        return Batch(source, target, params, label, keys)


class LabelledBatch(NamedTuple):
    """Augmented crops with their classes, on the pipeline's device; images in DALI's memory as those of Batch."""

    images: UInt8[Tensor, "b h w 3"]
    labels: Int64[Tensor, " b"]
    keys: SampleKeys


class CropLoader(EndlessLoader[Crops, LabelledBatch]):
    """Endless batches of augmented crops and their classes: training of the downstream protocols. Needs `label`."""

    pipeline = staticmethod(labelled_crops)
    settings_name = "crops"

    def batch(self, outputs: list[Tensor]) -> LabelledBatch:
        images, origins, codes = outputs
        keys = SampleKeys(origins)
        labels = parse_labels(codes, keys, self._source).to(images.device, non_blocking=True)
        return LabelledBatch(images, labels, keys)


class MaskBatch(NamedTuple):
    """Crops with their segmentation masks, on the pipeline's device, in DALI's memory as those of Batch."""

    images: UInt8[Tensor, "b h w 3"]
    masks: UInt8[Tensor, "b h w"]
    """Ids as the shards have them, and MaskCrops.void."""
    keys: SampleKeys


class MaskLoader(EndlessLoader[MaskCrops, MaskBatch]):
    """Endless batches of crops and their masks: training of segmentation."""

    pipeline = staticmethod(masked_crops)
    settings_name = "crops"
    masks = True

    def batch(self, outputs: list[Tensor]) -> MaskBatch:
        images, masks, origins = outputs
        return MaskBatch(images, masks[..., 0], SampleKeys(origins))


class ValidationBatch(NamedTuple):
    """Centre crops of consecutive samples, on the pipeline's device."""

    images: UInt8[Tensor, "b h w 3"]
    labels: Int64[Tensor, " b"] | None
    """None where the loader was given no label column."""
    keys: SampleKeys


class ValidationLoader:
    """The split once, in the order of its shards: every sample on one rank, the last batch smaller where it must be.

    Views as in A.2: shorter side to ceil(size · 256 / 224), centre crop of `size`. Each `iter` is a new pass.
    Raises ShardError as ViewLoader does.
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
        threads: int = 4,
        prefetch: int = 2,
        label: str | None = None,
        decoder: GpuDecoder = GPU_DECODER,
    ) -> None:
        backend, device_id = backend_of(device)
        self._source = open_source(folder, split, label=label, rank=rank, world_size=world_size)
        self._batch_size = batch_size
        self.samples = self._source.samples
        """This rank's share of the split."""
        self._build = lambda: centre_crops(
            self._source,
            size,
            backend=backend,
            read_ahead=prefetch,
            decoder=decoder,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )

    def __len__(self) -> int:
        """Batches of one pass on this rank."""
        return -(-self.samples // self._batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        pipeline = self._build()
        for start in range(0, self.samples, self._batch_size):
            images, origins, *codes = run(pipeline, self._source.folder)
            whole = min(self._batch_size, self.samples - start)
            keys, labels = SampleKeys(origins[:whole]), None
            if codes:
                labels = parse_labels(codes[0][:whole], keys, self._source).to(images.device, non_blocking=True)
            yield ValidationBatch(images[:whole], labels, keys)


class MaskedImage(NamedTuple):
    """A whole image and its mask, on the pipeline's device, in DALI's memory as those of Batch."""

    image: UInt8[Tensor, "h w 3"]
    mask: UInt8[Tensor, "h w"]
    key: str


class WholeImageLoader:
    """The split's images with their masks once, one at a time, in the order of its shards: each on one rank.

    Each `iter` is a new pass. Raises ShardError as MaskLoader does.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        threads: int = 4,
        prefetch: int = 2,
        decoder: GpuDecoder = GPU_DECODER,
    ) -> None:
        backend, device_id = backend_of(device)
        self._source = open_source(folder, split, masks=True, rank=rank, world_size=world_size)
        self._build = lambda: whole_images(
            self._source,
            backend=backend,
            read_ahead=prefetch,
            decoder=decoder,
            batch_size=1,  # images of one batch would have to be of one size
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )

    def __len__(self) -> int:
        """Images of one pass on this rank."""
        return self._source.samples

    def __iter__(self) -> Iterator[MaskedImage]:
        pipeline = self._build()
        for _ in range(len(self)):
            image, mask, origin = run(pipeline, self._source.folder)
            yield MaskedImage(image[0], mask[0, ..., 0], SampleKeys(origin)[0])
