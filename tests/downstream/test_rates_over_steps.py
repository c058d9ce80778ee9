"""Learning rates are torch's schedules, and a training is as long as its epochs, however a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from iwm import evaluate
from iwm.downstream import bench, protocol
from iwm.downstream.plan import Plan
from iwm.downstream.schedules import Shape, share_of_rate
from iwm.training.distributed import World


def of_torch(steps: int, warmup: int, shape: Shape) -> list[float]:
    """The rates of torch's own schedulers, one after the other, for a highest rate of 1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    rest = steps - warmup
    after: dict[Shape, Callable[[], LRScheduler]] = {
        "cosine": lambda: CosineAnnealingLR(optimizer, rest),
        "linear": lambda: LinearLR(optimizer, 1.0, 0.0, rest),
        "constant": lambda: ConstantLR(optimizer, 1.0),
    }
    parts = [after[shape]()]
    if warmup > 1:
        parts.insert(0, LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1))
        # The last step of the warm-up has the full rate, and so has the first after it.
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
def test_rates_are_those_of_torchs_schedulers(steps: int, warmup: int, shape: Shape) -> None:
    got = [share_of_rate(step, steps, warmup, shape) for step in range(steps)]
    assert got == pytest.approx(of_torch(steps, warmup, shape), abs=1e-9)


def test_a_schedule_begins_with_its_warm_up_and_ends_next_to_nothing() -> None:
    shares = [share_of_rate(step, 100, 10, "cosine") for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1
    assert 0 < shares[-1] < 1e-3
    assert share_of_rate(99, 100, 10, "linear") == pytest.approx(1 / 90)
    assert share_of_rate(99, 100, 10, "constant") == 1


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, leverage: Callable[..., Any]) -> Callable[..., Plan]:
    """What a protocol would train, of 120 images; nothing is trained."""

    def plan_of(name: str, **options: Any) -> Plan:
        plans: list[Plan] = []
        monkeypatch.setattr(protocol, "train", lambda plan, *rest: plans.append(plan))
        assert leverage(name, **{"steps": None, **options}) is None
        return plans[0]

    return plan_of


@pytest.mark.parametrize("micro_batch", [None, 25, 5])
@pytest.mark.parametrize("processes", [1, 2])
def test_epochs_are_as_many_steps_however_a_batch_is_split(
    monkeypatch: pytest.MonkeyPatch, planned: Callable[..., Plan], micro_batch: int | None, processes: int
) -> None:
    """Two and a half epochs of 120 images in steps of 50 are 6 steps; the micro-batch may change between two starts."""
    opened = bench.open_bench
    monkeypatch.setattr(evaluate, "open_bench", lambda *given: opened(*given[:-1], replace(given[-1], size=processes)))
    monkeypatch.setattr(World, "sum", lambda self, values: values * self.size)
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * self.size)
    plan = planned("linear", lrs=(1.0,), epochs=2.5, batch=50, micro_batch=micro_batch)
    assert plan.steps == 6
    assert plan.accumulation * (micro_batch or 50 // processes) * processes == 50


def test_the_warm_up_is_so_many_epochs_and_of_fewer_steps_the_same_share(planned: Callable[..., Plan]) -> None:
    plan = planned("linear", lrs=(1.0,), epochs=20.0, warmup_epochs=5.0, batch=20)
    assert (plan.steps, plan.steps_per_epoch) == (120, 6)
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert rates == pytest.approx([share_of_rate(step, 120, 30, "cosine") for step in range(120)])
    short = planned("linear", lrs=(1.0,), epochs=20.0, warmup_epochs=5.0, batch=20, steps=8)
    assert [short.rate(step) for step in range(3)] == [0.5, 1, 1]


def test_segmentation_decays_linearly(planned: Callable[..., Plan]) -> None:
    plan = planned("segmentation", steps=10, classes=4, channels=8, lrs=(1e-5,))
    assert [plan.rate(step) for step in range(10)] == pytest.approx([1 - step / 10 for step in range(10)])
