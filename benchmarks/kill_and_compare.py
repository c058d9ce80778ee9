"""Does a killed run go on exactly? python benchmarks/kill_and_compare.py OUT RECIPE [options of iwm/train.py]

Trains into OUT/whole undisturbed, and into OUT/cut with a kill -9 soon after the first checkpoint; then compares the
last checkpoints. Fails, and says by how much, where they are not bit for bit the same, or where nothing was killed. A
run in deterministic mode (--train.deterministic) should be; without it a GPU's sums come in any order.
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

TRAIN = Path(__file__).parents[1] / "iwm" / "train.py"


def command(run: Path, words: list[str]) -> list[str]:
    return [sys.executable, str(TRAIN), *words, "--run-dir", str(run)]


def kill_once(run: Path, words: list[str]) -> str | None:
    """Start a run and kill it soon after its first checkpoint: its newest checkpoint's name, or None if it was over.

    It is killed after at most the time from its first line of metrics to its first checkpoint.
    """
    process, metrics = subprocess.Popen(command(run, words)), run / "metrics.jsonl"
    _wait(process, metrics.exists)
    logged = time.monotonic()
    _wait(process, lambda: bool(checkpoints.all_checkpoints(run)))
    time.sleep(random.uniform(0, time.monotonic() - logged))
    over = process.poll() is not None
    process.kill()
    process.wait()
    return None if over else checkpoints.all_checkpoints(run)[-1].name


def _wait(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
    while not until() and process.poll() is None:
        time.sleep(0.01)


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    out, words = Path(sys.argv[1]), sys.argv[2:]
    if out.exists():
        print(f"benchmarks/kill_and_compare.py: {out} is there already; name a new folder", file=sys.stderr)
        return 2
    subprocess.run(command(out / "whole", words), check=True)
    newest = kill_once(out / "cut", words)
    if newest is None:
        print(f"benchmarks/kill_and_compare.py: {out / 'cut'} was over before it could be killed; give it more steps "
              "after its first checkpoint (--schedule.steps, --log.checkpoint-every)", file=sys.stderr)  # fmt: skip
        return 1
    print(f"killed with {newest} as its newest checkpoint")
    subprocess.run(command(out / "cut", words), check=True)
    whole, cut = (checkpoints.newest(out / name) for name in ("whole", "cut"))
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
    sys.exit(main())
