"""What the training tests share: a very small run, as a command and in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from iwm.config import Config
from iwm.train import parse
from iwm.training.distributed import World
from iwm.training.loop import pretrain
from iwm.training.session import open_session
from iwm.training.signals import StopWish

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
"""The caller's variables, with the project first in PYTHONPATH."""

TINY = {
    # On any machine: what a GPU does otherwise has tests of its own, and several processes would need several.
    "train.device": "cpu",
    "data.batch": 8,
    "data.threads": 1,
    "encoder.width": 32,
    "encoder.depth": 1,
    "predictor.width": 32,
    "predictor.depth": 1,
    "predictor.heads": 2,
    "log.every": 5,
    "log.checkpoint-every": 10,
    "log.health-every": 25,
    "log.health-images": 2,
    "log.health-bank": 8,
}


def arguments(shards: Path, run: Path, steps: int, *more: str) -> list[str]:
    """Arguments of iwm/train.py for a tiny run."""
    tiny = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    fixed = ["demo", "--run-dir", str(run), "--data.shards", str(shards), "--schedule.steps", str(steps)]
    return [*fixed, *tiny, "--log.no-tensorboard", *more]


def tiny_config(shards: Path, steps: int, **sections: Any) -> Config:
    """The configuration of that run; `sections` replace whole sections of it."""
    return replace(parse(arguments(shards, Path("unused"), steps)).config, **sections)


def command(shards: Path, run: Path, steps: int, *more: str, processes: int = 0) -> list[str]:
    """The command line of a tiny run; with `processes`, under torchrun."""
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


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def alone() -> World:
    return World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def train_here(config: Config, run: Path, wish: StopWish | None = None) -> None:
    """Train in this process."""
    run.mkdir(parents=True, exist_ok=True)
    pretrain(open_session(config, run, alone()), StopWish() if wish is None else wish)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Nested containers of tensors are bit for bit the same."""
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
