"""What the training step is compared with: another way to take a whole optimiser step on the same resident batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple

from stopwatch import Window, watch

from dali_pipelines.loader import Batch
from iwm.config import Config
from iwm.training.distributed import World


class Contender(NamedTuple):
    """One training step, whoever wrote it. Rates of contenders are compared by the FLOPs they need."""

    name: str
    step: Callable[[int], None]
    """Takes the number of an optimiser step, counted from 0, and takes that whole step on resident batches."""
    flops: float
    """Floating-point operations that are needed per image, in the sense of iwm/flops.py."""
    images: int
    """Images of one step, on this process."""


MakeContender = Callable[[Config, World, Sequence[Batch]], Contender]
"""Builds one, for these resident batches of a step."""


def measure_contender(here: World, contender: Contender, steps: int) -> Window:
    """Some of its steps, timed as the model's own are."""
    numbers = count()
    return watch(lambda: contender.step(next(numbers)), steps, here.device)
