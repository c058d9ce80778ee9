"""Learning rate, weight decay and EMA momentum of every step (paper, A.1; shapes as in I-JEPA's code)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from iwm.config import Config, Optim


class Values(NamedTuple):
    lr: float
    weight_decay: float
    ema: float


@dataclass(frozen=True)
class Schedules:
    """`steps` are trained; the schedules are made for `steps × stretch`, so that training ends before their end."""

    optim: Optim
    steps: int
    warmup: int
    stretch: float

    def at(self, step: int) -> Values:
        """Values of optimiser step `step`, counted from 0."""
        o, horizon = self.optim, self.steps * self.stretch
        done = (step + 1) / horizon
        if step < self.warmup:
            lr = o.start_lr + (o.lr - o.start_lr) * (step + 1) / self.warmup
        else:
            lr = _cosine(o.lr, o.final_lr, (step + 1 - self.warmup) / max(1.0, horizon - self.warmup))
        return Values(
            lr=lr,
            weight_decay=_cosine(o.weight_decay, o.final_weight_decay, done),
            ema=o.ema + (o.final_ema - o.ema) * min(1.0, done),
        )


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def schedules(config: Config, steps_per_epoch: int) -> Schedules:
    """Lay the run's schedules over its length in steps."""
    s = config.schedule
    steps = s.steps if s.steps is not None else max(1, round(s.epochs * steps_per_epoch))
    return Schedules(config.optim, steps, round(steps * s.warmup_epochs / s.epochs), s.stretch)
