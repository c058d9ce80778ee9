"""Cells of a study's tables: mean and range over seeds, with the paper's number."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NOT_RUN = "not run"

PAPER = "Paper: ViT-B/16, ImageNet, 300 epochs."
"""Remark on the paper's numbers in tables 1, 2 and S2."""


def cell(values: Sequence[float], printed: float | None = None, *, ours: int = 3, theirs: int = 2) -> str:
    """Format the values of one variant, one per seed. printed: the paper's value. ours, theirs: decimals."""
    return f"{_spread(values, ours)}{'' if printed is None else f', paper {printed:.{theirs}f}'}"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return NOT_RUN
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"
