"""Order in which DALI's reader visits a split's tars, so that they can be staged before it reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from dali_pipelines.dali import fn, pipeline_def
from dali_pipelines.reader import DataSource, shuffled
from shards.format import Entry, format_index


class Stretch(NamedTuple):
    """Part of a tar that a rank reads in one go."""

    shard: int
    """Number of the tar in the manifest."""
    samples: int


class ReadOrder:
    """Order of the samples of one rank, as stretches of tars, epoch by epoch.

    The reader's shuffle is DALI's own. A second reader, of tars with one empty sample each, tells the order.
    """

    def __init__(self, source: DataSource, shuffle_seed: int | None) -> None:
        """Store the arguments. shuffle_seed: seed of `read`; None: the order of the manifest in every epoch."""
        self.tars, self._seed = source.tars, shuffle_seed
        self._first, self._end = source.first, source.first + source.samples

    def stretches(self, epoch: int) -> Iterator[Stretch]:
        """Yield the stretches from the beginning of an epoch, and those of the following epochs, endlessly."""
        for tars in self._epochs(epoch):
            place = 0
            for tar in (self.tars[position] for position in tars):
                begin, end = max(place, self._first), min(place + tar.samples, self._end)
                if begin < end:
                    yield Stretch(tar.number, end - begin)
                place += tar.samples

    def _epochs(self, epoch: int) -> Iterator[list[int]]:
        """Yield the order of `tars` in an epoch and the following ones, as positions in that list."""
        if self._seed is None:
            while True:
                yield list(range(len(self.tars)))
        with TemporaryDirectory() as folder:
            pipeline = _order_pipeline(Path(folder), len(self.tars), self._seed)
            for _ in range(epoch):
                pipeline.run()
            while True:
                (infos,) = pipeline.run()
                yield [int(bytes(row).rstrip(b"\0").rpartition(b":")[2].partition(b".")[0]) for row in infos.as_array()]


def _order_pipeline(folder: Path, shards: int, seed: int) -> Any:
    """Return a built pipeline whose runs give an epoch's order each, as the names of its samples."""
    tar = folder / "empty.tar"
    tar.write_bytes(bytes(1024))
    indexes = []
    for number in range(shards):
        index = folder / f"{number}.idx"
        index.write_bytes(format_index([[Entry("jpg", 512, 1, f"{number}.jpg")]]))
        indexes.append(str(index))

    @pipeline_def(batch_size=shards, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def order() -> Any:
        sample = fn.readers.webdataset(
            paths=[str(tar)] * shards,
            index_paths=indexes,
            ext=["jpg"],
            missing_component_behavior="error",
            **shuffled(1, seed),
        )
        return fn.pad(fn.get_property(sample, key="source_info"), fill_value=0)

    pipeline = order()
    pipeline.build()
    return pipeline
