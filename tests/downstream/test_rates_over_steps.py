"""Learning rates are those of torch's schedulers; the number of steps does not depend on the split of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from iwm import protocols
from iwm.downstream import context, experiment
from iwm.downstream.progress import TrainPlan
from iwm.training.distributed import DistEnv
from iwm.training.optim import LrShape, lr_factor


def of_torch(steps: int, warmup: int, shape: LrShape) -> list[float]:
    """Return the rates of torch's schedulers in sequence, for a peak rate of 1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    rest = steps - warmup
    after: dict[LrShape, Callable[[], LRScheduler]] = {
        "cosine": lambda: CosineAnnealingLR(optimizer, rest),
        "linear": lambda: LinearLR(optimizer, 1.0, 0.0, rest),
        "constant": lambda: ConstantLR(optimizer, 1.0),
    }
    parts = [after[shape]()]
    if warmup > 1:
        parts.insert(0, LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1))
        # The last step of the warm-up and the first step after it have the full rate.
        schedule: LRScheduler = SequentialLR(optimizer, parts, [warmup])
    else:
        schedule = parts[0]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(40, 0), (40, 7), (9, 8), (1, 0)])
def test_rates_are_those_of_torchs_schedulers(steps: int, warmup: int, shape: LrShape) -> None:
    got = [lr_factor(step, steps, warmup, shape) for step in range(steps)]
    assert got == pytest.approx(of_torch(steps, warmup, shape), abs=1e-9)


def test_a_schedule_begins_with_its_warm_up_and_ends_next_to_nothing() -> None:
    shares = [lr_factor(step, 100, 10, "cosine") for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1
    assert 0 < shares[-1] < 1e-3
    assert lr_factor(99, 100, 10, "linear") == pytest.approx(1 / 90)
    assert lr_factor(99, 100, 10, "constant") == 1


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, leverage: Callable[..., Any]) -> Callable[..., TrainPlan]:
    """Return a function that plans a protocol on 120 images without training."""

    def plan_of(name: str, **options: Any) -> TrainPlan:
        plans: list[TrainPlan] = []
        monkeypatch.setattr(experiment, "train", lambda plan, *rest: plans.append(plan))
        assert leverage(name, **{"steps": None, **options}) is None
        return plans[0]

    return plan_of


@pytest.mark.parametrize("micro_batch", [None, 25, 5])
@pytest.mark.parametrize("processes", [1, 2])
def test_epochs_are_as_many_steps_however_a_batch_is_split(
    monkeypatch: pytest.MonkeyPatch, planned: Callable[..., TrainPlan], micro_batch: int | None, processes: int
) -> None:
    """2.5 epochs of 120 images in steps of 50 are 6 steps; the micro-batch size may change when training resumes."""
    opened = context.open_run
    monkeypatch.setattr(protocols, "open_run", lambda *given: opened(*given[:-1], replace(given[-1], size=processes)))
    monkeypatch.setattr(DistEnv, "sum", lambda self, values: values * self.size)
    monkeypatch.setattr(DistEnv, "all_gather", lambda self, value: [value] * self.size)
    plan = planned("linear", lr=(1.0,), epochs=2.5, batch_size=50, micro_batch_size=micro_batch)
    assert plan.steps == 6
    assert plan.accumulation * (micro_batch or 50 // processes) * processes == 50


def test_the_warm_up_is_so_many_epochs_and_of_fewer_steps_the_same_share(planned: Callable[..., TrainPlan]) -> None:
    plan = planned("linear", lr=(1.0,), epochs=20.0, warmup_epochs=5.0, batch_size=20)
    assert (plan.steps, plan.steps_per_epoch) == (120, 6)
    rates = [plan.lr_factor(step) for step in range(plan.steps)]
    assert rates == pytest.approx([lr_factor(step, 120, 30, "cosine") for step in range(120)])
    short = planned("linear", lr=(1.0,), epochs=20.0, warmup_epochs=5.0, batch_size=20, steps=8)
    assert [short.lr_factor(step) for step in range(3)] == [0.5, 1, 1]


def test_segmentation_decays_linearly(planned: Callable[..., TrainPlan]) -> None:
    plan = planned("segmentation", steps=10, classes=4, channels=8, lr=(1e-5,))
    assert [plan.lr_factor(step) for step in range(10)] == pytest.approx([1 - step / 10 for step in range(10)])
