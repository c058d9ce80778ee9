"""Test of exact resume after kill -9: python benchmarks/kill_and_compare.py OUT RECIPE [options of iwm/train.py]

Trains into OUT/whole without interruption, and into OUT/cut with a kill -9 soon after the first checkpoint; then
compares the last checkpoints. Fails where they are not bit-identical, with the size of the difference, or where the run
ended before the kill. Runs in deterministic mode (--train.deterministic) should be identical; without it the order of a
GPU's sums varies.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from iwm.training import checkpoint as checkpoints
from shards.command_line import run_command

TRAIN = Path(__file__).parents[1] / "iwm" / "train.py"


def command(run: Path, words: list[str]) -> list[str]:
    return [sys.executable, str(TRAIN), *words, "--run-dir", str(run)]


def kill_once(run: Path, words: list[str]) -> str | None:
    """Start a run, kill it soon after its first checkpoint, and return its newest checkpoint's name; None if it ended.

    The delay after the checkpoint is at most the time from the first line of metrics to the first checkpoint.
    """
    process, metrics = subprocess.Popen(command(run, words)), run / "metrics.jsonl"
    _wait(process, metrics.exists)
    logged = time.monotonic()
    _wait(process, lambda: bool(checkpoints.list_checkpoints(run)))
    time.sleep(random.uniform(0, time.monotonic() - logged))
    over = process.poll() is not None
    process.kill()
    process.wait()
    return None if over else checkpoints.list_checkpoints(run)[0].name


def _wait(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
    while not until() and process.poll() is None:
        time.sleep(0.01)


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    out, words = Path(sys.argv[1]), sys.argv[2:]
    if out.exists():
        print(f"benchmarks/kill_and_compare.py: {out} already exists; choose another folder", file=sys.stderr)
        return 2
    subprocess.run(command(out / "whole", words), check=True)
    newest = kill_once(out / "cut", words)
    if newest is None:
        print(f"benchmarks/kill_and_compare.py: {out / 'cut'} ended before it could be killed; give it more steps "
              "after its first checkpoint (--schedule.steps, --log.checkpoint-interval)", file=sys.stderr)  # fmt: skip
        return 1
    print(f"killed with {newest} as its newest checkpoint")
    subprocess.run(command(out / "cut", words), check=True)
    whole, cut = (checkpoints.load_newest(out / name) for name in ("whole", "cut"))
    assert whole is not None
    assert cut is not None
    apart = {
        name: ((value.double() - cut.model[name].double()).norm() / value.double().norm()).item()
        for name, value in whole.model.items()
        if not torch.equal(value, cut.model[name])
    }
    if not apart:
        print(f"step {cut.step}: {len(whole.model)} tensors bit for bit the same")
        return 0
    worst = max(apart, key=lambda name: apart[name])
    print(f"{len(apart)} of {len(whole.model)} tensors differ, {worst} most: {apart[worst]:.2e} of its norm")
    return 1


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/kill_and_compare.py"))
