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
import logging
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from environment import BenchmarkError
from fault_server import FAULTS, FaultServer, serving
from kill_and_compare import compare, kill_after_checkpoint, run_to_end
from rich.console import Console
from rich.table import Table
from synthetic_data import GENERATED, generated_shards

from shards.command_line import run_command
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize
from shards.urls import upload

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
    files = [name for shard in manifest.shards for name in (shard.name, shard.index)]
    halves = [given.faults // 2, given.faults - given.faults // 2]
    plans = [
        [(name, given.kinds[i % len(given.kinds)]) for i, name in enumerate(rng.sample(files, half))] for half in halves
    ]

    def words(name: str, *more: str) -> list[str]:
        fixed = ["--run-dir", str(out / name), "--data.val", "None", "--schedule.steps", str(given.steps)]
        intervals = ["--log.interval", "2", "--log.checkpoint-interval", "7", "--log.no-tensorboard"]
        return [given.recipe, *fixed, *intervals, "--train.deterministic", "--train.no-compile", *more]

    table = Table("training", "requests", "faults met", "MB copied", "of", "seconds", "parameters")
    ended, ok = 0.0, True

    def row(name: str, server: FaultServer | None, copied: Path | None) -> None:
        nonlocal ok
        same = name == "disk" or compare(out / "disk", out / name)
        faults = Counter(answer.fault for answer in server.served if answer.fault) if server else Counter[str]()
        missed = len(server.plan) if server else 0
        ok = ok and same and not missed
        size = f"{_megabytes(copied):,.1f}" if copied else ""
        met = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.items()))
        requests = str(len(server.served)) if server else ""
        verdict = "the reference" if name == "disk" else "the same, bit for bit" if same else "DIFFERENT"
        table.add_row(name, requests, met, size, f"{manifest.bytes / 1e6:,.1f}", f"{ended:.0f}", verdict)

    def train(name: str, *more: str) -> None:
        nonlocal ended
        began = time.monotonic()
        run_to_end(words(name, *more), 0, 1, out / f"{name}.log")
        ended = time.monotonic() - began

    train("disk", "--data.shards", str(shards))
    row("disk", None, None)
    with serving(shards) as server:
        server.plan = plans[0]
        train("faults", "--data.shards", server.url, "--data.cache", str(out / "cache"))
        row("faults", server, out / "cache")
    with serving(shards) as server:
        server.plan = plans[1]
        remote = ["--data.shards", server.url, "--data.cache", str(out / "cache-of-killed")]
        kill_after_checkpoint(words("killed", *remote), out / "killed.log")
        shutil.rmtree(out / "cache-of-killed")
        train("killed", *remote)
        row("killed", server, out / "cache-of-killed")
    with s3_server() as bucket:
        for file in sorted(shards.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                upload(file, f"{bucket}/{file.name}")
        train("s3", "--data.shards", bucket, "--data.cache", str(out / "cache-of-s3"))
        row("s3", None, out / "cache-of-s3")
    console.print(table)
    return 0 if ok else 1


def _megabytes(cache: Path) -> float:
    """Return what the tars of a cache take on the disk (10⁶ bytes)."""
    return sum(512 * tar.stat().st_blocks for tar in cache.glob("*/*.tar")) / 1e6


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server in this process; yield the URL of a bucket. Child processes find it by environment variables."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise BenchmarkError(f"an S3 server is needed ({error}); pip install 'moto[server]'") from error
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(variables)
    try:
        boto3.client("s3").create_bucket(Bucket="shards")
        yield "s3://shards/train"
    finally:
        for name in variables:
            del os.environ[name]
        server.stop()


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/remote_training.py"))
