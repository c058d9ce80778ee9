"""Settings of the searches for an action (iwm/models/action_search.py, cross_entropy.py).

This module imports no torch, so that a command can read its options before that is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from iwm.ranges import ConfigError, Range

SearchName = Literal["gradient", "cem"]


@dataclass(frozen=True)
class GradientSettings:
    """Search by gradient: points spread over the range of training, and descent from the nearest of them."""

    points: Annotated[int, Range(min=2)] = 128
    """Actions of the lattice, at least 2, the null action among them.
    Their number does not depend on the number of entries of an action."""
    starts: Annotated[int, Range(min=1)] = 2
    """Points of the lattice that the descent starts from: the nearest ones with different flags."""
    steps: Annotated[int, Range(min=1)] = 16
    """Steps of Adam from each start, and after each flip of a flag."""
    rate: Annotated[float, Range(above=0)] = 0.05
    """Learning rate of the first step, as a share of each entry's range; it falls to 0 as a half cosine."""


@dataclass(frozen=True)
class CEMSettings:
    """Search by the cross-entropy method: rounds of samples, each round drawn around the nearest of the one before."""

    samples: Annotated[int, Range(min=2)] = 64
    """Actions of each round, at least 2."""
    elites: Annotated[int, Range(min=1)] = 8
    """Nearest actions of a round that the next one is drawn around; fewer than the samples."""
    rounds: Annotated[int, Range(min=1)] = 6
    """Number of rounds."""
    least_deviation: Annotated[float, Range(min=0)] = 0.01
    """Smallest standard deviation of an entry, as a share of its range."""

    def check(self) -> None:
        """Raise ConfigError where there are not more samples than elites."""
        if self.elites >= self.samples:
            raise ConfigError(f"--cem.elites {self.elites}: must be less than --cem.samples {self.samples}")
