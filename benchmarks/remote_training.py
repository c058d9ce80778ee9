"""Training on shards at URLs whose servers fail, against training on the same folder.

python benchmarks/remote_training.py OUT [--faults 50] [--seed 0] [--recipe demo] [--steps 60]

Four trainings of the same seed:

    disk      reads OUT/shards
    faults    copies them from a web server that resets, stalls, truncates, is busy and corrupts (fault_server.py)
    killed    the same with other faults; killed with kill -9 after a checkpoint, resumed with an empty cache
    s3        copies them from an S3 server (moto)

Fails where the parameters at the end differ from those of `disk` by a bit, or where a fault was not met.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

from environment import BenchmarkError
from fault_server import FAULTS, FaultServer, serving
from kill_and_compare import compare, kill_after_checkpoint, run_to_end
from local_servers import BUCKET, s3_server
from rich.console import Console
from synthetic_data import GENERATED, generated_shards

from iwm.evaluation.result_table import ResultTable
from shards.command_line import run_command
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize
from shards.urls import join, upload

SHARD_MB = 0.5
"""Size of a shard (10⁶ bytes): many small ones, so that many requests can fail."""


def main() -> int:
    parser = argparse.ArgumentParser(
        "benchmarks/remote_training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for shards, caches, runs and their logs")
    parser.add_argument("--faults", type=int, default=50, help="injected faults, over two trainings (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the files that faults hit (default: 0)")
    parser.add_argument("--recipe", default="demo", help="recipe of iwm/train.py (default: demo)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60, 3 epochs)")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=FAULTS, help="kinds of faults (default: all)")
    given = parser.parse_args()
    if given.out.exists():
        raise BenchmarkError(f"{given.out} already exists; choose another folder")
    return run(given, Console())


def run(given: argparse.Namespace, console: Console) -> int:
    """Train, print the table, and return the exit status."""
    out, rng = given.out, random.Random(given.seed)
    generated_shards(console)
    shards = out / "shards"
    small = ShardingOptions(str(GENERATED / "tiles"), shards, shard=ShardSize(shard_mb=SHARD_MB))
    manifest = make_shards(small, Console(quiet=True))["train"]
    console.print(f"{len(manifest.shards)} shards, {manifest.bytes / 1e6:,.1f} MB")
    files = [name for shard in manifest.shards for name in (shard.name, shard.index)]
    halves = [given.faults // 2, given.faults - given.faults // 2]
    plans = [
        [(name, given.kinds[i % len(given.kinds)]) for i, name in enumerate(rng.sample(files, half))] for half in halves
    ]

    def words(name: str, *more: str) -> list[str]:
        fixed = ["--run-dir", str(out / name), "--data.val", "None", "--schedule.steps", str(given.steps)]
        intervals = ["--log.interval", "2", "--log.checkpoint-interval", "7", "--log.no-tensorboard"]
        return [given.recipe, *fixed, *intervals, "--train.deterministic", "--train.no-compile", *more]

    rows = []
    ok = True

    def add_row(name: str, seconds: float, cache: Path | None = None, server: FaultServer | None = None) -> None:
        nonlocal ok
        same = name == "disk" or compare(out / "disk", out / name)
        ok = ok and same and not (server and server.plan)
        faults = Counter(answer.fault for answer in server.served if answer.fault) if server else Counter[str]()
        rows.append(
            [
                name,
                str(len(server.served)) if server else "",
                ", ".join(f"{count} {kind}" for kind, count in sorted(faults.items())),
                f"{_megabytes(cache):,.1f}" if cache else "",
                f"{manifest.bytes / 1e6:,.1f}",
                f"{seconds:.0f}",
                "the reference" if name == "disk" else "the same, bit for bit" if same else "DIFFERENT",
            ]
        )

    def train(name: str, *data: str) -> float:
        """Train to the end; return the seconds."""
        _, _, seconds = run_to_end(words(name, *data), 0, 1, out / f"{name}.log")
        return seconds

    add_row("disk", train("disk", "--data.shards", str(shards)))
    with serving(shards) as server:
        server.plan, cache = plans[0], out / "cache"
        seconds = train("faults", "--data.shards", server.url, "--data.cache", str(cache))
        add_row("faults", seconds, cache, server)
    with serving(shards) as server:
        server.plan, cache = plans[1], out / "cache-of-killed"
        remote = ["--data.shards", server.url, "--data.cache", str(cache)]
        kill_after_checkpoint(words("killed", *remote), out / "killed.log")
        shutil.rmtree(cache)
        add_row("killed", train("killed", *remote), cache, server)
    with s3_server() as variables:
        os.environ |= variables
        url, cache = f"s3://{BUCKET}/train", out / "cache-of-s3"
        for file in sorted(shards.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                upload(file, join(url, file.name))
        add_row("s3", train("s3", "--data.shards", url, "--data.cache", str(cache)), cache)
    columns = ["training", "requests", "faults met", "MB copied", "of", "seconds", "parameters"]
    console.print(ResultTable("", columns, rows))
    return 0 if ok else 1


def _megabytes(cache: Path) -> float:
    """Return what the tars of a cache take on the disk (10⁶ bytes)."""
    return sum(512 * tar.stat().st_blocks for tar in cache.glob("*/*.tar")) / 1e6


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/remote_training.py"))
