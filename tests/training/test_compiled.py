"""The compiled step: the eager step's losses, and no recompilation once it is warm."""

import json
import sys
from pathlib import Path

import pytest

from iwm.train import parse
from iwm.training.signals import StopWish
from tests.training.runs import arguments, finish, metrics, train_here

STEPS, COMPARED, WARM = 500, 24, 3
GRAPHS = 11
"""Embedding, block and norm of both encoders, placing, block and finishing of the predictor, norm of targets, loss."""


class StopAfter(StopWish):
    """Asked after every step; wants to stop after some."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_nothing_is_recompiled_in_500_steps_and_losses_are_the_eager_ones(tiny_shards: Path, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    settings = ("--train.precision", "fp32", "--log.every", "4", "--log.health-every", "250")
    words = arguments(tiny_shards, compiled, STEPS, *settings)
    train_here(parse([*words, "--train.no-compile"]).config, eager, StopAfter(COMPARED))
    output = finish([sys.executable, "tests/training/graphs.py", str(compiled), *words, "--train.compile"])
    counted = json.loads(output.splitlines()[-1])
    assert len(counted["graphs"]) >= STEPS
    assert counted["graphs"][-1] == counted["graphs"][WARM], f"recompiled after step {WARM}: {counted['graphs']}"
    assert counted["graphs"][-1] == GRAPHS
    assert counted["breaks"] == 0
    losses = [[line["loss"] for line in metrics(run) if "loss" in line][: COMPARED // 4] for run in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
