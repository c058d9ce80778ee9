"""Which samples, in which order, for which rank; and the geometry that both views of a sample share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dali_pipelines.dali import dali_math, fn, types
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.photometric import Backend, DataNode
from shards.manifest import Column, Manifest, ShardError, load_manifest
from shards.verify import check_quick

READER = "reader"
"""Name of the reader in every pipeline, for its metadata."""


MASK = "mask.png"
"""Tar component of segmentation masks."""


@dataclass(frozen=True)
class Source:
    """The part of a split that one rank reads, checked against the manifest.

    Ranks share the split by sample: rank r of w reads samples [N·r // w, N·(r + 1) // w) of the epoch's order.
    """

    folder: Path
    manifest: Manifest
    column: Column | None
    """Label column that is read beside the image."""
    masks: bool
    """Whether its mask is read instead."""
    rank: int
    world_size: int

    @property
    def component(self) -> str | None:
        """Tar component that is read beside the image; None: the image alone."""
        return MASK if self.masks else self.column.component if self.column else None

    @property
    def first(self) -> int:
        """Index of the rank's first sample in the epoch's order."""
        return self.manifest.samples * self.rank // self.world_size

    @property
    def samples(self) -> int:
        """Samples of one epoch that are this rank's."""
        return self.manifest.samples * (self.rank + 1) // self.world_size - self.first

    @property
    def most_samples(self) -> int:
        """Samples of the rank that has most."""
        return -(-self.manifest.samples // self.world_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of the tars in their order: equal only if the samples and their order are."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()


def open_source(
    folder: Path, split: str, *, label: str | None = None, masks: bool = False, rank: int, world_size: int
) -> Source:
    """Check the shards and settle on what this rank reads: images alone, with a label column, or with their masks.

    Raises ShardError for shards that differ from their manifest, a label column or masks that are not there, or fewer
    shards than ranks.
    """
    if masks and label is not None:
        raise ValueError("a pipeline reads labels or masks, not both")
    manifest = load_manifest(folder, split)
    check_quick(folder, manifest)
    if len(manifest.shards) < world_size:
        raise ShardError(
            f"{folder}: split '{split}' has {len(manifest.shards)} shards for {world_size} processes; make it again "
            "with smaller shards (tools/make_shards.py), or start fewer processes"
        )
    if masks and not manifest.masks:
        raise ShardError(
            f"{folder}: split '{split}' has no segmentation masks; make it again from a source that has them "
            "(tools/make_shards.py --help), or name another split"
        )
    column = manifest.column(label) if label is not None else None
    return Source(folder, manifest, column, masks, rank, world_size)


class Encoded(NamedTuple):
    """What the reader hands on."""

    jpeg: DataNode
    label: DataNode | None
    """ASCII digits, uint8 [n], padded with zeros to the batch's longest."""
    mask: DataNode | None
    """An encoded PNG."""
    origin: DataNode
    """ASCII "tar:offset:KEY.jpg", uint8 [n], padded with zeros to the batch's longest."""


def read(source: Source, *, shuffle_buffer: int, seed: int, prefetch: int) -> Encoded:
    """Samples of this rank, endlessly, each epoch padded to whole batches with its last sample.

    `shuffle_buffer` 0: in the order of the shards, every epoch the same. Otherwise the tars are put into a new order
    after each epoch (from `seed`, which must be every rank's) and samples leave a buffer of that many at random (from
    the pipeline's seed).
    """
    paths = [str(source.folder / shard.name) for shard in source.manifest.shards]
    indexes = [str(source.folder / shard.index) for shard in source.manifest.shards]
    order = (
        {"random_shuffle": True, "initial_fill": shuffle_buffer, "shuffle_after_epoch": True}
        | {"shuffle_after_epoch_seed": seed}
        if shuffle_buffer
        else {"stick_to_shard": True}
    )
    components: Any = fn.readers.webdataset(
        name=READER,
        paths=paths,
        index_paths=indexes,
        ext=["jpg"] if source.component is None else ["jpg", source.component],
        missing_component_behavior="error",
        shard_id=source.rank,
        num_shards=source.world_size,
        pad_last_batch=True,
        prefetch_queue_depth=prefetch,
        **order,
    )
    if source.component is None:
        return Encoded(components, None, None, _origin(components))
    jpeg, beside = components
    if source.component == MASK:
        return Encoded(jpeg, None, beside, _origin(jpeg))
    return Encoded(jpeg, fn.pad(beside, fill_value=0), None, _origin(jpeg))


def _origin(jpeg: DataNode) -> DataNode:
    return fn.pad(fn.get_property(jpeg, key="source_info"), fill_value=0)


class Crop(NamedTuple):
    """The geometry of a sample. Pixels of the decoded image; the flip is BOOL."""

    start: DataNode
    """(y, x), int64."""
    shape: DataNode
    """(height, width), int64."""
    image_shape: DataNode
    """(height, width, channels), int64."""
    flip: DataNode


Interpolation = Literal["linear", "cubic"]
"""How a crop is resized, antialiased either way. `cubic`: Pillow's bicubic (a = -0.5), which may overshoot."""


def draw_crop(jpeg: DataNode, scale: tuple[float, float], ratio: tuple[float, float], flip_probability: float) -> Crop:
    """Draw box and flip as torchvision's RandomResizedCrop and RandomHorizontalFlip do (paper, A.1).

    `scale`: area as a share of the image, uniform. `ratio`: width / height, log-uniform. Place uniform, ten attempts.
    """
    image_shape = fn.peek_image_shape(jpeg)
    start, shape = fn.random_crop_generator(
        image_shape, random_area=list(scale), random_aspect_ratio=list(ratio), num_attempts=10
    )
    flip = fn.random.coin_flip(probability=flip_probability, dtype=types.BOOL)
    return Crop(start, shape, image_shape, flip)


def decode_box(jpeg: DataNode, crop: Crop, backend: Backend, decoder: GpuDecoder) -> DataNode:
    """Decode and cut the box out: uint8 HWC.

    Cut before any resize, as torchvision does: a resize of the box within its image would look over the box's edge.
    On CPU the cut is part of the decode, bit for bit the same and a tenth faster; on GPU that path of nvImageCodec can
    crash (its issue 55).
    """
    if backend == "cpu":
        return fn.decoders.image_slice(jpeg, start=crop.start, shape=crop.shape, axes=[0, 1])
    return fn.slice(decode(jpeg, backend, decoder), start=crop.start, shape=crop.shape, axes=[0, 1])


def resize_box(
    box: DataNode, crop: Crop, size: int, backend: Backend, interpolation: Interpolation = "linear"
) -> DataNode:
    """Resize to size×size with antialiasing: uint8 HWC. The flip is part of it, which reads the box from the right."""
    interp_type = _INTERPOLATIONS[interpolation]
    left = fn.cast(crop.flip, dtype=types.FLOAT)
    if backend == "gpu":
        start, end = fn.stack(0.0, left), fn.stack(1.0, 1.0 - left)
        return fn.resize(
            box,
            size=[size, size],
            roi_start=start,
            roi_end=end,
            roi_relative=True,
            interp_type=interp_type,
            minibatch_size=256,  # by default 32 images are a launch
        )
    columns = _columns(crop, size)
    end = fn.stack(1.0, left + (1.0 - 2.0 * left) * columns / float(size))
    wide = fn.stack(float(size), columns)
    start = fn.stack(0.0, left)
    image = fn.resize(box, size=wide, roi_start=start, roi_end=end, roi_relative=True, interp_type=interp_type)
    return fn.slice(image, start=[0], shape=[size], axes=[1])


_INTERPOLATIONS = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}


def _columns(crop: Crop, size: int) -> DataNode:
    """Columns to resize a box to on a CPU, at least `size`; those beyond lie outside the box and are thrown away.

    DALI resizes rows and columns one after the other. Columns last, onto bytes, is twice as fast as columns first, yet
    its estimate of the costs (made for GPUs) puts the axis first that shrinks more. With so many columns that no box
    shrinks more along its rows, columns come last. The columns that are kept stay what they were, bit for bit but for
    a rounding in 100,000.
    """
    height, width = crop.shape[0], crop.shape[1]
    shrinks = fn.cast(height >= size, dtype=types.INT64)
    columns = dali_math.max(size, (width * size // height + 2) * shrinks)
    return fn.cast(columns, dtype=types.FLOAT)


def decode(jpeg: DataNode, backend: Backend, decoder: GpuDecoder) -> DataNode:
    """The whole image, uint8 HWC RGB, upright."""
    if backend == "cpu":
        return fn.decoders.image(jpeg)
    return fn.decoders.image(
        jpeg,
        device="mixed",
        hw_decoder_load=decoder.hw_load,
        preallocate_width_hint=decoder.width_hint,
        preallocate_height_hint=decoder.height_hint,
        jpeg_fancy_upsampling=True,
    )
