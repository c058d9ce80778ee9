"""Does a killed run go on exactly? python benchmarks/kill_and_compare.py OUT RECIPE [options of iwm/train.py]

Trains into OUT/whole undisturbed, and into OUT/cut with a kill -9 soon after the first checkpoint; then compares the
last checkpoints. Fails, and says by how much, where they are not bit for bit the same. A run in deterministic mode
(--train.deterministic) should be; without it a GPU's sums come in any order.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from iwm.training import checkpoint as checkpoints

TRAIN = Path(__file__).parents[1] / "iwm" / "train.py"


def command(run: Path, words: list[str]) -> list[str]:
    return [sys.executable, str(TRAIN), *words, "--run-dir", str(run)]


def kill_once(run: Path, words: list[str]) -> str:
    """Start a run and kill it up to five seconds after its first checkpoint; what there was to kill."""
    process = subprocess.Popen(command(run, words))
    while not checkpoints.all_checkpoints(run) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(random.uniform(0, 5))
    if process.poll() is not None:
        return "it was over before it could be killed: give it more steps after its first checkpoint"
    process.kill()
    process.wait()
    return f"killed with {checkpoints.all_checkpoints(run)[-1].name} as its newest checkpoint"


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    out, words = Path(sys.argv[1]), sys.argv[2:]
    if out.exists():
        print(f"benchmarks/kill_and_compare.py: {out} is there already; name a new folder", file=sys.stderr)
        return 2
    subprocess.run(command(out / "whole", words), check=True)
    print(kill_once(out / "cut", words))
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
