"""The choice of mode `tune` among candidates that were measured in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Rates = Mapping[int | float, Sequence[float]]
"""Images/s of each candidate, in the order of preference, a value per turn."""

TIE = 0.02
"""Two candidates that differ by less are as fast as each other."""

HEADROOM = 1.3
"""Rate of the pipeline alone over the model's that training is not to wait with."""


def choose(rates: Rates) -> tuple[int | float, str]:
    """The first candidate that keeps up with the fastest, and why.

    It keeps up if it is as fast in a quarter of the turns: what slows a turn down slows both, so that one which is
    really slower is slower in nearly all.
    """
    fastest = max(rates, key=lambda value: float(np.median(rates[value])))

    def share(value: int | float, percentile: float) -> float:
        return float(np.percentile(np.divide(rates[value], rates[fastest]), percentile))

    value = next(value for value in rates if share(value, 75) >= 1 - TIE)
    if value == fastest:
        return value, f"{value} is the fastest, and none before it keeps up"
    return value, f"{fastest} is the fastest; {value} keeps up, at {share(value, 50):.2f} of its speed in the median"


def enough(rates: Rates, model: float) -> list[int | float]:
    """The candidates whose median rate is HEADROOM times the model's."""
    return [value for value, turns in rates.items() if float(np.median(turns)) >= HEADROOM * model]


def choose_share(rates: Rates, model: float) -> tuple[int | float, str]:
    """The largest share of the decoder's hardware that is fast enough for the model, and why.

    Not the fastest alone: each image that the hardware decodes takes nothing from the cores and multiprocessors that
    training uses. Where no share is fast enough, the one that `choose` takes.
    """
    if fast := enough(rates, model):
        value = max(fast)
        times = float(np.median(rates[value])) / model
        return (
            value,
            f"{value} is the largest share with {HEADROOM} times the model's {model:.0f} images/s ({times:.2f})",
        )
    value, why = choose(rates)
    return value, f"none reaches {HEADROOM} times the model's {model:.0f} images/s; {why}"
