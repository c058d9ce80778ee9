"""Schedules, compared with the paper's values and a reference implementation."""

import math

import pytest

from iwm.config import Config
from iwm.train_config import ScheduleConfig
from iwm.training.optim import build_schedules

PER_EPOCH = 625  # ImageNet at batch 2048
PAPER = build_schedules(Config(), PER_EPOCH)


def test_a_run_is_as_long_as_its_epochs_and_the_warmup_40_of_300() -> None:
    assert PAPER.steps == 300 * PER_EPOCH
    assert PAPER.warmup == 40 * PER_EPOCH


def test_the_learning_rate_warms_up_linearly_then_follows_the_stretched_cosine() -> None:
    assert PAPER.values_at(PAPER.warmup // 2 - 1).lr == pytest.approx(6e-4)
    assert PAPER.values_at(PAPER.warmup - 1).lr == pytest.approx(1e-3)
    last = 300 * PER_EPOCH - 1
    progress = (last + 1 - PAPER.warmup) / (1.25 * 300 * PER_EPOCH - PAPER.warmup)
    assert PAPER.values_at(last).lr == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * progress)))
    assert PAPER.values_at(last).lr > 1e-4, "training must end before its schedule does"


def test_weight_decay_rises_on_a_cosine_and_momentum_on_a_line() -> None:
    assert PAPER.values_at(0).weight_decay == pytest.approx(0.04, abs=1e-4)
    end = PAPER.values_at(PAPER.steps - 1)
    assert end.weight_decay == pytest.approx(0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi / 1.25)))
    assert end.ema == pytest.approx(0.996 + 0.004 / 1.25)


def test_steps_replace_epochs_and_keep_the_share_of_warmup() -> None:
    plan = build_schedules(Config(schedule=ScheduleConfig(steps=600)), PER_EPOCH)
    assert (plan.steps, plan.warmup) == (600, 80)
