"""Ten kill -9 at random moments, half while shards are made and half in training: nothing is lost, nothing differs.

python -m pytest -m long -s tests/test_ten_kills.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iwm.training import checkpoint as checkpoints
from tests.training.runs import ROOT, assert_same, command, finish, metrics, start

KILLS = 5
STEPS = 400


def test_ten_kills_leave_shards_byte_for_byte_and_parameters_bit_for_bit_the_same(tmp_path: Path) -> None:
    seed = time.time_ns()
    rng = random.Random(seed)
    print(f"\nseed {seed}")
    photographs = draw_images(tmp_path / "images", 1500)

    def making(out: str) -> list[str]:
        tool = [sys.executable, "tools/make_shards.py", str(photographs), str(tmp_path / out), "--split", "train"]
        return [*tool, "--resize", "320", "--shard-mb", "2"]

    finish(making("whole"))
    seconds = killed_until_done(
        making("cut"), rng, lambda: (tmp_path / "cut").exists(), lambda: (tmp_path / "cut/manifest.json").exists()
    )
    print(f"shards: {KILLS} kills after {seconds} s of work; comparing with the uninterrupted result")
    whole, cut = (contents(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []
    print(f"shards: {len(whole)} files byte for byte the same")

    def training(run: str) -> list[str]:
        return command(tmp_path / "cut", tmp_path / run, STEPS, "--data.val", "None", "--log.checkpoint-every", "5")

    finish(training("run"))
    run = tmp_path / "run-cut"
    seconds = killed_until_done(
        training("run-cut"),
        rng,
        lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0,
        lambda: (
            bool(checkpoints.all_checkpoints(run)) and checkpoints.all_checkpoints(run)[0].stem.endswith(f"{STEPS}")
        ),
    )
    print(f"training: {KILLS} kills after {seconds} s of work; comparing with the uninterrupted run")
    one, other = checkpoints.newest(tmp_path / "run"), checkpoints.newest(run)
    assert one is not None
    assert other is not None
    assert one.step == other.step == STEPS
    assert_same(one.model, other.model)
    assert_same(one.optimizer, other.optimizer)
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(tmp_path / "run")]
    print(f"training: {len(one.model)} tensors and the optimiser's state bit for bit the same after {STEPS} steps")


def killed_until_done(
    line: list[str], rng: random.Random, working: Callable[[], bool], done: Callable[[], bool]
) -> list[float]:
    """Start a command and kill it, KILLS times, each at a random moment of its work; then let it finish.

    A moment is a random time after `working` is first true. Returns those times, in seconds.
    """
    moments: list[float] = []
    while len(moments) < KILLS:
        process = start(line)
        while not working() and process.poll() is None:
            time.sleep(0.01)
        moment = rng.uniform(0.0, 1.5) + (0.0 if not moments else startup_seconds())
        try:
            output = process.communicate(timeout=moment)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            moments.append(round(moment, 2))
        else:
            assert process.returncode == 0, output
            assert not done(), f"the work ended after {len(moments)} kills: give it more to do"
    finish(line)
    return moments


@cache
def startup_seconds() -> float:
    """How long this machine needs to import the program: a kill before that is no kill at work."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import iwm.train"], cwd=ROOT, check=True)
    return time.monotonic() - began


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def draw_images(folder: Path, count: int) -> Path:
    """JPEGs of 500×375 in three classes, smooth with noise, as photographs are to a decoder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + rng.normal(0, 6, (375, 500, 1))
        path = folder / f"class{number % 3}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
