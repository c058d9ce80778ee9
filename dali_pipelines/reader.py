"""Shard reader: samples of each rank, and their order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dali_pipelines.dali import fn
from dali_pipelines.pixels import DataNode
from shards.cache import SplitCache, source_of
from shards.errors import ShardError
from shards.format import Column, Manifest, load_manifest
from shards.split_part import PartIndexes, PartTar, SplitPart
from shards.verify import check_quick

READER = "reader"
"""Name of the reader operator in every pipeline, for access to its metadata."""


MASK = "mask.png"
"""Tar component of segmentation masks."""


@dataclass(frozen=True)
class DataSource:
    """Part of a split that one rank reads, checked against the manifest.

    The split is divided by samples: rank r of w reads samples [N·r // w, N·(r + 1) // w) of the epoch's order.
    """

    folder: Path
    manifest: Manifest
    column: Column | None
    """Label column that is read with the image; None without labels."""
    masks: bool
    """True where the segmentation mask is read with the image, in place of a label."""
    rank: int
    world_size: int
    cache: SplitCache | None = None
    """Cache in `folder`, whose shards are staged as they are needed; None for shards that are all there."""
    indexes: PartIndexes | None = None
    """Indexes of the part of the split that is read; None: all of it is read."""

    @property
    def tars(self) -> list[PartTar]:
        """Tars of which samples are read, with their indexes."""
        if self.indexes is not None:
            return self.indexes.tars
        shards = self.manifest.shards
        return [PartTar(i, shard.samples, self.folder / shard.index) for i, shard in enumerate(shards)]

    @property
    def total(self) -> int:
        """Number of samples of all ranks in an epoch."""
        return sum(tar.samples for tar in self.tars) if self.indexes else self.manifest.samples

    @property
    def component(self) -> str | None:
        """Tar component that is read with the image; None for the image alone."""
        return MASK if self.masks else self.column.component if self.column else None

    @property
    def first(self) -> int:
        """Index of the rank's first sample in the epoch's order."""
        return self.total * self.rank // self.world_size

    @property
    def samples(self) -> int:
        """Number of this rank's samples in an epoch."""
        return self.total * (self.rank + 1) // self.world_size - self.first

    @property
    def most_samples(self) -> int:
        """Number of samples of the rank that has most."""
        return -(-self.total // self.world_size)

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches that every rank makes in an epoch; a rank with fewer samples repeats some."""
        return -(-self.most_samples // batch_size)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the split, and the part. It identifies samples and order."""
        return self.manifest.fingerprint + (f" {self.indexes.part}" if self.indexes else "")


def open_source(
    folder: Path,
    split: str,
    *,
    label: str | None = None,
    masks: bool = False,
    rank: int,
    world_size: int,
    part: SplitPart | None = None,
) -> DataSource:
    """Check the shards and return this rank's source: images alone, with a label column, or with masks.

    part: part of the split; None: all of it. Raise ShardError for shards that differ from their manifest, a missing
    label column, missing masks, fewer shards or samples than ranks; raise ValueError for both a label and masks.
    """
    if masks and label is not None:
        raise ValueError("a pipeline reads labels or masks, not both")
    manifest, origin = load_manifest(folder, split), source_of(folder)
    if origin is None:
        check_quick(folder, manifest)
    if len(manifest.shards) < world_size:
        raise ShardError(
            f"{folder}: split '{split}' has {len(manifest.shards)} shards for {world_size} processes; remake it "
            "with smaller shards (iwm shards), or start fewer processes"
        )
    if masks and not manifest.masks:
        raise ShardError(
            f"{folder}: split '{split}' has no segmentation masks; remake it from a source with masks "
            "(iwm shards --help), or use another split"
        )
    column = manifest.column(label) if label is not None else None
    cache = SplitCache(folder, origin, manifest) if origin else None
    indexes = PartIndexes(folder, manifest, part) if part else None
    source = DataSource(folder, manifest, column, masks, rank, world_size, cache, indexes)
    if source.total < world_size:
        raise ShardError(
            f"{folder}: {source.total} images of split '{split}' are read by {world_size} processes; start fewer, or "
            "use more images"
        )
    return source


class EncodedSample(NamedTuple):
    """Outputs of the reader for a sample."""

    jpeg: DataNode
    """An encoded JPEG, uint8 [n]."""
    label: DataNode | None
    """ASCII digits, uint8 [n], padded with zeros to the batch's longest."""
    mask: DataNode | None
    """An encoded PNG, uint8 [n]."""
    source_info: DataNode
    """ASCII "tar:offset:KEY.jpg", uint8 [n], padded with zeros to the batch's longest."""


def shuffled(buffer: int, seed: int) -> dict[str, Any]:
    """Return the reader's arguments for tars in an order that changes with the epoch, and samples from a buffer."""
    return {
        "random_shuffle": True,
        "initial_fill": buffer,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": seed,
    }


def read(source: DataSource, *, shuffle_buffer: int, seed: int, prefetch: int) -> EncodedSample:
    """Read this rank's samples endlessly; each epoch is padded to whole batches with its last sample.

    `shuffle_buffer` 0: the order of the shards, the same in every epoch. Otherwise the tars are shuffled after each
    epoch by `seed`, which must be the same on all ranks, and samples are drawn from a buffer of this size by the
    pipeline's seed.
    """
    paths = [str(source.folder / source.manifest.shards[tar.number].name) for tar in source.tars]
    indexes = [str(tar.index_file) for tar in source.tars]
    order = shuffled(shuffle_buffer, seed) if shuffle_buffer else {"stick_to_shard": True}
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
        # A tar that may be evicted is not mapped: its samples are copied when they are read.
        dont_use_mmap=source.cache is not None and source.cache.limit is not None,
        **order,
    )
    if source.component is None:
        return EncodedSample(components, None, None, _source_info(components))
    jpeg, extra = components
    if source.component == MASK:
        return EncodedSample(jpeg, None, extra, _source_info(jpeg))
    return EncodedSample(jpeg, fn.pad(extra, fill_value=0), None, _source_info(jpeg))


def _source_info(jpeg: DataNode) -> DataNode:
    return fn.pad(fn.get_property(jpeg, key="source_info"), fill_value=0)
