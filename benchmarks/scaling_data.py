"""Data past one machine: prints the tables of docs/scaling.md about making, storing and staging shards.

python benchmarks/scaling_data.py [--images N ...] [--bytes-per-image B] [--nodes N ...] [--price-per-gb P]

python benchmarks/scaling_data.py --measure 10000000    (plans so many synthetic images, and uses the rates measured)

All figures are products and quotients of the options, printed as a formula above each table. The default rates were
measured on two cores of an Intel Xeon; bandwidths and the price are examples, to be replaced by your own.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tyro
from scaling_tables import RESIZED_BYTES, table

from shards.command_line import run_command
from shards.errors import UserError
from shards.format import Column, Entry, format_index
from shards.listing import LABEL, SampleList, sample_key
from shards.plan import TAR_BLOCK, ShardSize, plan_shards
from shards.samples import FileRef, Sample
from shards.sources.detect import SourceOptions, list_source
from shards.writer import TarWriter

NAMES = {1_281_167: "ImageNet-1k", 14_197_122: "ImageNet-22k", 1_000_000_000: "a billion"}
"""Data sets by their number of images."""
MAPPED_TARS = 32_765
"""Tars up to which DALI's reader maps all: half of vm.max_map_count, by default 65,530. Of more it opens every file."""
PACKED_BYTES = 48
"""Bytes of a sample in the plan's table, beside its path (shards/samples.py)."""
ROW_BYTES = 16
"""Bytes of a sample that only memory holds: its hash and a sorted one, for duplicates; later its place in the order."""
IN_A_TAR = 2000
"""Samples of a synthetic tar: about as many as a shard of 64 MB has."""
SYNTHETIC_CLASSES = 21_841
"""Class folders of the synthetic images, as many as ImageNet-22k has."""


@dataclass(frozen=True)
class ScalingDataOptions:
    """Sizes, rates and prices. Times are in the unit that the name says, sizes in bytes, 1 GB is 10⁹ bytes."""

    images: tuple[int, ...] = tuple(NAMES)
    """Numbers of images of the data sets."""
    bytes_per_image: float = RESIZED_BYTES
    """Mean size of a JPEG in the shards (bytes). Default: made with --resize 320, measured on tiles of photographs."""
    path_bytes: float = 31.0
    """Mean length of a path in the source, for example n01440764/n01440764_10026.JPEG (bytes)."""
    cores: tuple[int, ...] = (16, 256, 4096)
    """Numbers of cores that decode, resize and write images."""
    core_rate: float = 338.0
    """Images per second and core with --resize 320: photographs of 500×375 (docs/lab-notebook.md, 2026-11-22)."""
    list_us: float = 6.7
    """Time to list an image without the disk: name, key and place in the table (µs, --measure)."""
    tar_us: float = 74.0
    """Time to list an image of a WebDataset tar that is in the page cache: two headers and a label (µs, --measure)."""
    plan_us: float = 2.9
    """Time per image for duplicates, digest, permutation and cut (µs, --measure)."""
    shard_mb: float = ShardSize.shard_mb
    """Size of a shard (10⁶ bytes)."""
    nodes: tuple[int, ...] = (1, 8, 64)
    """Numbers of nodes that copy the shards to their disks."""
    node_gbit: float = 25.0
    """Bandwidth into one node (Gbit/s). An example."""
    store_gbit: float = 400.0
    """Bandwidth out of the store, which all nodes share (Gbit/s). An example."""
    price_per_gb: float = 0.05
    """Price of a GB that leaves the store. An example, not an offer: 0 within the region of most stores."""
    measure: int | None = None
    """Plan this number of synthetic images, print CPU time and memory, and use the rates in place of the options'."""


class DataFigures(NamedTuple):
    """Figures of one data set."""

    list_seconds: float
    tar_seconds: float
    plan_seconds: float
    table_bytes: float
    memory_bytes: float
    tar_bytes: float
    index_bytes: float

    def shards(self, shard_mb: float) -> int:
        return max(round(self.tar_bytes / (shard_mb * 1e6)), ShardSize.min_shards)


def figures(images: int, options: ScalingDataOptions) -> DataFigures:
    """Return times (seconds) and sizes (bytes) for a number of images with one label."""
    return DataFigures(
        list_seconds=images * options.list_us / 1e6,
        tar_seconds=images * options.tar_us / 1e6,
        plan_seconds=images * options.plan_us / 1e6,
        table_bytes=images * (PACKED_BYTES + options.path_bytes),
        memory_bytes=images * ROW_BYTES,
        tar_bytes=images * tar_bytes(options.bytes_per_image),
        index_bytes=images * index_bytes(options),
    )


def tar_bytes(image: float) -> float:
    """Return the mean bytes of a sample in a tar: an image and a label, each with a header and half a block of padding.

    A label always takes one block.
    """
    return TAR_BLOCK + image + TAR_BLOCK / 2 + 2 * TAR_BLOCK


def index_bytes(options: ScalingDataOptions) -> int:
    """Return the bytes of a sample's line in an index, in the middle of a shard."""
    key = "n01440764%2Fn01440764_10026"
    jpeg, offset = round(options.bytes_per_image), round(options.shard_mb * 1e6 / 2)
    entries = [Entry("jpg", offset, jpeg, f"{key}.jpg"), Entry("cls", offset + jpeg, 3, f"{key}.cls")]
    return len(format_index([entries])) - len(format_index([]))


def staging_seconds(size: float, nodes: int, options: ScalingDataOptions) -> float:
    """Return the time until every node has a copy of `size` bytes, limited by its own or the store's bandwidth."""
    return 8e-9 * size / min(options.node_gbit, options.store_gbit / nodes)


def name_of(images: int) -> str:
    return f"{NAMES.get(images, 'yours')}, {images:,}"


def rounded(value: float) -> str:
    """Return a number with two digits after the point, with none from 10 on."""
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def plan_table(options: ScalingDataOptions) -> str:
    rows = []
    for images in options.images:
        data = figures(images, options)
        cores = [rounded(images / (options.core_rate * cores) / 3600) for cores in options.cores]
        times = [rounded(seconds / 60) for seconds in (data.list_seconds, data.tar_seconds, data.plan_seconds)]
        sizes = [rounded(size / 1e9) for size in (data.table_bytes, data.memory_bytes)]
        rows.append([name_of(images), *times, *sizes, *cores])
    heads = ["images", "listing, min", "listing of tars, min", "plan, min", "table, GB", "memory, GB"]
    return table([*heads, *(f"making on {cores:,} cores, h" for cores in options.cores)], rows)


def storage_table(options: ScalingDataOptions) -> str:
    rows = []
    for images in options.images:
        data = figures(images, options)
        shards = data.shards(options.shard_mb)
        least = math.ceil(max(options.shard_mb, data.tar_bytes / 1e6 / MAPPED_TARS))
        sizes = [rounded(data.tar_bytes / 1e12), rounded(data.index_bytes / 1e9)]
        counts = [f"{shards:,}", f"{shards if shards > MAPPED_TARS else 0:,}", f"{least:,}"]
        rows.append([name_of(images), *sizes, *counts])
    heads = ["images", "tars, TB", "indexes, GB", f"shards of {options.shard_mb:g} MB", "open files of each process"]
    return table([*heads, "least --shard-mb without open files"], rows)


def staging_table(options: ScalingDataOptions) -> str:
    rows = []
    for images in options.images:
        data = figures(images, options)
        size = data.tar_bytes + data.index_bytes
        for nodes in options.nodes:
            hours = staging_seconds(size, nodes, options) / 3600
            out = size * nodes / 1e9
            cells = [rounded(hours), rounded(out / 1e3), f"{out * options.price_per_gb:,.0f}"]
            rows.append([name_of(images), f"{nodes}", *cells])
    heads = ["images", "nodes", "until all have a copy, h", "leaves the store, TB"]
    return table([*heads, f"at {options.price_per_gb:g} per GB"], rows)


TABLES: dict[str, tuple[str, Callable[[ScalingDataOptions], str]]] = {
    "Making": (
        "listing = images · list_us (tars: tar_us); plan = images · plan_us; table = images · (48 + path_bytes); "
        "memory = images · 16; making = images / (core_rate · cores)",
        plan_table,
    ),
    "Storage": (
        "tars = images · (bytes_per_image + 1,792); indexes = images · line of the index; shards = tars / shard_mb; "
        f"open files = shards beyond {MAPPED_TARS:,}, else 0",
        storage_table,
    ),
    "Staging": (
        "hours = 8 · (tars + indexes) / min(node_gbit, store_gbit / nodes) / 3600; cost = nodes · GB · price_per_gb",
        staging_table,
    ),
}


class PlanCost(NamedTuple):
    """Cost of planning synthetic images in this process, in CPU time: other programs change the clock's more."""

    list_us: float
    plan_us: float
    list_gb: float
    """Peak of the resident memory that listing adds (10⁹ bytes); with mapped files, which the system can drop."""
    plan_gb: float
    """The same, of listing and plan."""


def measure_plan(images: int) -> PlanCost:
    """List synthetic images, without files, in as many class folders as ImageNet-22k has, and plan their shards."""
    before, start = peak_gb(), time.process_time()
    classes = [f"n{number:08d}" for number in range(SYNTHETIC_CLASSES)]
    labels = [(name,) for name in classes]
    listing = SampleList([Column(LABEL, "cls", classes)])
    each = -(-images // len(classes))
    for place in range(images):
        folder = classes[place // each]
        stem = f"{folder}/{folder}_{place}"
        image = FileRef("/data", f"{stem}.JPEG", None, 100_000 + place % 5000)
        listing.samples.append(Sample(sample_key(stem), image, labels[place // each]))
    listed, list_gb = time.process_time(), peak_gb() - before
    plan = plan_shards(listing, None, 0, None, ShardSize())
    plan.shard(0)
    planned = time.process_time()
    return PlanCost((listed - start) / images * 1e6, (planned - listed) / images * 1e6, list_gb, peak_gb() - before)


def measure_tar(images: int) -> float:
    """Return the CPU time to list one of `images` samples with a label in WebDataset tars in the page cache (µs)."""
    with TemporaryDirectory() as folder:
        for start in range(0, images, IN_A_TAR):
            with open(Path(folder) / f"{start:09d}.tar", "wb") as file:
                tar = TarWriter(file)
                for place in range(start, min(start + IN_A_TAR, images)):
                    tar.add(f"{place:09d}", "jpg", b"not an image")
                    tar.add(f"{place:09d}", "cls", b"7")
                tar.close()
        begun = time.process_time()
        list_source(folder, "webdataset", SourceOptions())
        return (time.process_time() - begun) / images * 1e6


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def check(options: ScalingDataOptions) -> None:
    """Raise UserError for an option that must be above 0 and is not."""
    for field in fields(options):
        value = getattr(options, field.name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        least = 0 if field.name == "price_per_gb" else 1e-9
        if any(number < least for number in values):
            raise UserError(f"--{field.name.replace('_', '-')} must be {'at least' if least == 0 else 'above'} 0")


def main() -> None:
    options = tyro.cli(ScalingDataOptions, description=__doc__, prog="benchmarks/scaling_data.py")
    check(options)
    if options.measure is not None:
        found, tar_us = measure_plan(options.measure), measure_tar(min(options.measure, 100_000))
        seconds = [options.measure * each / 1e6 for each in (found.list_us, found.plan_us)]
        print(
            f"{options.measure:,} images, CPU time: listing {seconds[0]:.1f} s ({found.list_us:.1f} µs each), "
            f"plan {seconds[1]:.1f} s ({found.plan_us:.1f} µs each); peak memory {found.list_gb:.2f} GB after listing, "
            f"{found.plan_gb:.2f} GB after the plan; listing a tar {tar_us:.0f} µs for each image\n"
        )
        measured = {"list_us": found.list_us, "plan_us": found.plan_us, "tar_us": tar_us}
        options = ScalingDataOptions(**{**vars(options), **measured})
    for title, (formula, make) in TABLES.items():
        print(f"{title}: {formula}\n\n{make(options)}\n")


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/scaling_data.py"))
