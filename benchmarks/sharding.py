"""Speed of making shards: images/s of Ray's tasks against worker processes, on this machine, in turns.

python benchmarks/sharding.py [--source DIR] [--images 6000] [--resize 320] [--turns 3]

Each turn makes the same shards once with either, which begins in turns. Ray's cluster is started for a turn and stopped
after it; its start, with that of its first workers, is timed by itself. Other programs on the machine disturb images/s,
but less so images per second of CPU time, which counts all processes of a distributor.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple, get_args

import tyro
from rich.console import Console
from synthetic_data import generated_tiles
from timing import paired_ratio, ratio_text

from iwm.evaluation.result_table import ResultTable
from iwm.ranges import Range, check_ranges
from shards.command_line import run_command
from shards.distributors import DistributorName
from shards.errors import UserError
from shards.images import ImageOptions
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize
from shards.ray_cluster import join_cluster, require_ray
from shards.workers import available_cores


@dataclass(frozen=True)
class ShardingBenchmarkOptions:
    """Speed of making shards, by distributor."""

    source: str | None = None
    """Images, as for iwm shards. None: tiles of scikit-image's photographs, 500×375 pixels."""
    images: Annotated[int, Range(min=1)] = 6000
    """Number of tiles, without --source."""
    resize: Annotated[int, Range(min=1)] = 320
    """Shorter side of the images in the shards (pixels)."""
    shard_mb: Annotated[float, Range(above=0)] = 8.0
    """Size of a shard (megabytes)."""
    turns: Annotated[int, Range(min=1)] = 3
    """Number of turns."""
    folder: Path | None = None
    """Folder for tiles and shards, which are deleted at the end. None: the system's temporary folder."""


class MadeShards(NamedTuple):
    """Measurement of one run."""

    images: int
    start: float
    """Start of the cluster (seconds)."""
    seconds: float
    """The run without that start."""
    cpu_seconds: float
    """CPU time of this process and all below it during the run."""
    bytes: int


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(ShardingBenchmarkOptions, args=arguments, description=__doc__)
    check_ranges(options)
    require_ray()
    # Ray's workers have niceness 15: beside other programs of the machine they would get less of it than processes do.
    os.environ |= {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    console = Console(highlight=False)
    runs: dict[str, list[MadeShards]] = defaultdict(list)
    with TemporaryDirectory(dir=options.folder) as folder:
        source = options.source or str(generated_tiles(Path(folder, "data"), options.images))
        for turn in range(options.turns):
            names: tuple[DistributorName, ...] = get_args(DistributorName)
            for distributor in names if turn % 2 == 0 else reversed(names):
                out = Path(folder, f"{distributor}-{turn}")
                runs[distributor].append(made := make(source, out, distributor, options))
                rate = f"{made.images / made.seconds:,.1f} images/s"
                console.print(f"turn {turn + 1}, {distributor}: {made.images:,} images in {made.seconds:.1f} s, {rate}")
        sizes = {made.bytes for turns in runs.values() for made in turns}
    if len(sizes) > 1:
        raise UserError(f"the distributors' shards differ: {sorted(sizes)} bytes")
    console.print(table(runs, available_cores()))


def make(source: str, out: Path, distributor: DistributorName, options: ShardingBenchmarkOptions) -> MadeShards:
    """Make the shards once."""
    sharding = ShardingOptions(
        source,
        out,
        distributor=distributor,
        image=ImageOptions(resize=options.resize),
        shard=ShardSize(shard_mb=options.shard_mb),
    )
    silent = Console(quiet=True)
    begin = time.perf_counter()
    if distributor == "ray":
        join_cluster(silent)
    start, begin, used = time.perf_counter() - begin, time.perf_counter(), cpu_seconds(os.getpid())
    manifest = make_shards(sharding, silent)["train"]
    seconds, used = time.perf_counter() - begin, cpu_seconds(os.getpid()) - used
    if distributor == "ray":
        import ray

        ray.shutdown()
    return MadeShards(manifest.read, start, seconds, used, manifest.bytes)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, its ended children and all living processes below it."""
    try:
        # The name, in brackets, may contain spaces; utime, stime, cutime and cstime follow 11 fields after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [
            child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in children)


def table(runs: dict[str, list[MadeShards]], cores: int) -> ResultTable:
    """Return medians of each distributor, and ratios to worker processes: median, lowest and highest turn."""
    rows, base = [], runs["processes"]
    for name, turns in runs.items():
        rates = [made.images / made.seconds for made in turns]
        efficiencies = [made.images / made.cpu_seconds for made in turns]
        faster = paired_ratio([made.seconds for made in base], [made.seconds for made in turns])
        leaner = paired_ratio([made.cpu_seconds for made in base], [made.cpu_seconds for made in turns])
        start = median([made.start for made in turns])
        cells = [f"{median(rates):,.1f}", f"{median(rates) / cores:,.1f}", ratio_text(faster)]
        rows.append([name, *cells, f"{median(efficiencies):,.1f}", ratio_text(leaner), f"{start:.1f} s"])
    columns = ["", "images/s", "per core", "ratio", "images/CPU s", "ratio", "start"]
    return ResultTable("Medians; ratios to worker processes: median (lowest–highest turn)", columns, rows)


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/sharding.py"))
