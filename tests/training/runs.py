"""Helpers of the training tests: a very small run, as a command and in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from iwm.config import Config
from iwm.evaluation.health import health_check
from iwm.train_options import parse
from iwm.training.distributed import DistEnv
from iwm.training.loop import pretrain
from iwm.training.runtime import StopFlag
from iwm.training.train_state import build_train_state

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
"""Environment variables of commands, with the project first in PYTHONPATH."""

TINY = {
    # Always the CPU: GPU behaviour has separate tests, and several processes would need several GPUs.
    "train.device": "cpu",
    "data.global_batch_size": 8,
    "data.num_threads": 1,
    "encoder.embed_dim": 32,
    "encoder.depth": 1,
    "predictor.embed_dim": 32,
    "predictor.depth": 1,
    "predictor.num_heads": 2,
    "log.interval": 5,
    "log.checkpoint_interval": 10,
    "log.eval_interval": 25,
    "log.eval_images": 2,
    "log.eval_bank_size": 8,
}


def arguments(shards: Path | str, run: Path, steps: int, *more: str) -> list[str]:
    """Return the arguments of iwm/train.py for a tiny run."""
    tiny = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    fixed = ["demo", "--run-dir", str(run), "--data.shards", str(shards), "--schedule.steps", str(steps)]
    return [*fixed, *tiny, "--log.no-tensorboard", *more]


def tiny_config(shards: Path, steps: int, **sections: Any) -> Config:
    """Return the configuration of that run; `sections` replace whole sections."""
    return replace(parse(arguments(shards, Path("unused"), steps)).config, **sections)


def command(shards: Path | str, run: Path, steps: int, *more: str, processes: int = 0) -> list[str]:
    """Return the command line of a tiny run; with `processes`, under torchrun."""
    head = [sys.executable]
    if processes:
        head += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*head, "iwm/train.py", *arguments(shards, run, steps, *more)]


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(line: list[str], expect: int = 0) -> str:
    process = start(line)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == expect, output
    return output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], every: float = 0.02) -> None:
    """Wait for a condition while the process runs; fail with its output where it ends before, or hangs.

    every: time between two looks (seconds).
    """
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the process runs, but what is waited for does not come"
        time.sleep(every)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def alone() -> DistEnv:
    return DistEnv(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def train_here(config: Config, run: Path, stop: StopFlag | None = None) -> None:
    """Train in this process."""
    run.mkdir(parents=True, exist_ok=True)
    state = build_train_state(config, run, alone())
    pretrain(state, StopFlag() if stop is None else stop, health_check(config, alone()))


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Assert that nested containers of tensors are bit-identical."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert one == other, where
