"""What the training step is compared with: another way to take a whole optimiser step on the same resident batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Contender(NamedTuple):
    """One training step, whoever wrote it. Rates of contenders are compared by the FLOPs they need."""

    name: str
    step: Callable[[int], None]
    """Takes the number of an optimiser step, counted from 0, and takes that whole step on resident batches."""
    flops: float
    """Floating-point operations that are needed per image, in the sense of iwm/flops.py."""
    images: int
    """Images of one step, on this process."""
