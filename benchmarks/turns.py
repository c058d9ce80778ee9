"""Take turns: each measurement once, then each again, so that what slows the machine for a while slows all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from stopwatch import Window, forget_peak, peak_gib

from iwm.training.distributed import World

LEAST_STEPS = 5
"""Of one window, however slow the steps are."""


class Measured(NamedTuple):
    """Something that takes steps and can be measured."""

    window: Callable[[int], Window]
    """Takes so many steps."""
    images: int
    """Of one step, on this process."""
    flops: float | None = None
    """Needed per image, in the sense of iwm/flops.py; None where nothing is trained."""


class Turn(NamedTuple):
    window: Window
    images_per_second: float
    """Of all processes together."""
    images_per_cpu_second: float
    """Of this process: what is left of the rate when others want the same cores, and the same for one core or many."""
    memory_gib: float


def interleave(
    measured: Mapping[str, Measured],
    here: World,
    *,
    seconds: float,
    repeats: int,
    settling: int,
    between: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, list[Turn]]:
    """Turns of each: `seconds` in all, in `repeats` windows. `between` is called once after each round of them.

    Every window begins with `settling` steps that do not count. Its number of steps follows from as many more, taken
    once; all processes agree on it.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in measured}
    steps: dict[str, int] = {}
    for turn in range(repeats):
        for name, (window_of, images, _) in measured.items():
            say(f"turn {turn + 1} of {repeats}: {name}")
            window_of(settling)
            if name not in steps:
                slowest = max(here.gather(window_of(settling).seconds / settling))
                steps[name] = max(LEAST_STEPS, math.ceil(seconds / repeats / slowest))
            forget_peak(here.device)
            window = window_of(steps[name])
            peak = max(here.gather(peak_gib(here.device)))
            rate = sum(here.gather(images * len(window.steps) / window.seconds))
            turns[name].append(Turn(window, rate, images * len(window.steps) / window.cpu_seconds, peak))
        between()
    return turns


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90, to four significant digits."""
    p10, median, p90 = (float(f"{p:.4g}") for p in np.percentile(values, (10, 50, 90)))
    return {"median": median, "p10": p10, "p90": p90}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Of two measurements, turn by turn: what slows a whole turn down slows both."""
    ratios = [float(f"{a / b:.4g}") for a, b in zip(over, under, strict=True)]
    return {"median": float(np.median(ratios)), "lowest": min(ratios), "highest": max(ratios)}
