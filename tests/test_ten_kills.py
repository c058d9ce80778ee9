"""Ten kill -9 at random moments of making shards and training lose nothing and change no result.

python -m pytest -m long -s tests/test_ten_kills.py
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iwm.training import checkpoint as checkpoints
from tests.training.runs import assert_same, command, finish, metrics, start, wait_until

KILLS = 5
STEPS = 400


def test_ten_kills_leave_shards_byte_for_byte_and_parameters_bit_for_bit_the_same(tmp_path: Path) -> None:
    seed = time.time_ns()
    rng = random.Random(seed)
    print(f"\nseed {seed}")
    images = draw_images(tmp_path / "images", 1500)

    def making(out: Path) -> list[str]:
        options = ["--split", "train", "--resize", "320", "--shard-mb", "2"]
        return [sys.executable, "tools/make_shards.py", str(images), str(out), *options]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill_until_done(making, Path.exists, whole, cut, rng)
    files, others = contents(whole), contents(cut)
    assert files.keys() == others.keys()
    assert [name for name in files if files[name] != others[name]] == []
    print(f"shards: {len(files)} files byte for byte those of an uninterrupted run")

    def training(run: Path) -> list[str]:
        return command(whole, run, STEPS, "--data.val", "None", "--log.checkpoint-interval", "5")

    whole_run, cut_run = tmp_path / "run", tmp_path / "run-cut"
    kill_until_done(training, lambda run: bool(checkpoints.list_checkpoints(run)), whole_run, cut_run, rng)
    one, other = checkpoints.load_newest(whole_run), checkpoints.load_newest(cut_run)
    assert one is not None
    assert other is not None
    assert one.step == other.step == STEPS
    assert_same(one.model, other.model)
    assert_same(one.optimizer, other.optimizer)
    assert [line["step"] for line in metrics(cut_run)] == [line["step"] for line in metrics(whole_run)]
    print(f"training: {len(one.model)} tensors and the optimiser bit for bit those of an uninterrupted run")


def kill_until_done(
    job: Callable[[Path], list[str]], has_begun: Callable[[Path], bool], whole: Path, cut: Path, rng: random.Random
) -> None:
    """Run a job without interruption into `whole`, and with KILLS kills at random moments into `cut`.

    has_begun: returns True for the folder of a job that has something to lose, before which none is killed.
    """
    began = time.monotonic()
    process = start(job(whole))
    wait_until(lambda: has_begun(whole), process)
    startup = time.monotonic() - began
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    work = time.monotonic() - began - startup
    print(f"{job(whole)[1]}: {startup:.1f} s to start, {work:.1f} s of work")
    moments: list[str] = []
    while len(moments) < KILLS:
        process = start(job(cut))
        moment = startup + rng.uniform(0, work / 4)
        try:
            output = process.communicate(timeout=moment)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            moments.append(f"{moment:.2f}")
        else:
            assert process.returncode == 0, output
            shutil.rmtree(cut)  # finished before it could be killed: start over
    print(f"killed after {', '.join(moments)} s")
    finish(job(cut))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def draw_images(folder: Path, count: int) -> Path:
    """Write JPEGs of 500×375 in three classes, smooth with noise, which decode like photographs."""
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


pytestmark = [pytest.mark.long, pytest.mark.timeout(5400)]
