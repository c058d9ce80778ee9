"""Sizes of blocks as I-JEPA's code draws them (masking.sampler `official`): one for all blocks of a batch. No torch."""

from __future__ import annotations

import math
from collections import Counter

from iwm.model_config import MaskingConfig
from iwm.ranges import ConfigError

Sides = tuple[int, int]
"""Height and width of a block (patches)."""

QUANTILES = 10_000
"""Number of evenly spaced draws that the distribution of sizes is computed from."""


def block_sides(draw: float, grid: int, area: tuple[float, float], aspect: tuple[float, float]) -> Sides:
    """Return the sides of a block from one number in [0, 1), which gives both its area and its aspect ratio.

    area: range of the share of the grid; aspect: range of height / width. A side is at most grid − 1.
    """
    cells = int(grid * grid * (area[0] + draw * (area[1] - area[0])))
    ratio = aspect[0] + draw * (aspect[1] - aspect[0])
    height, width = (round(math.sqrt(square)) for square in (cells * ratio, cells / ratio))
    return max(1, min(height, grid - 1)), max(1, min(width, grid - 1))


def target_sides(masking: MaskingConfig, grid: int, draw: float) -> Sides:
    """Return the sides of a target block from one number in [0, 1)."""
    return block_sides(draw, grid, masking.block_scale, masking.block_aspect_ratio)


def context_sides(masking: MaskingConfig, grid: int, draw: float) -> Sides:
    """Return the sides of a context block, which is square, from one number in [0, 1)."""
    return block_sides(draw, grid, masking.context_scale, (1.0, 1.0))


def size_shares(masking: MaskingConfig, grid: int) -> dict[tuple[Sides, Sides], float]:
    """Return the sizes of target and context blocks that batches have, with the share of the batches (sum 1)."""
    draws = [(number + 0.5) / QUANTILES for number in range(QUANTILES)]
    targets, contexts = (Counter(of(masking, grid, draw) for draw in draws) for of in (target_sides, context_sides))
    return {
        (target, context): count * other / QUANTILES**2
        for target, count in targets.items()
        for context, other in contexts.items()
    }


def check_sizes(masking: MaskingConfig, grid: int) -> None:
    """Raise ConfigError where blocks of sampler `official` can be too small for masking.min_keep."""
    for sides in {sides for pair in size_shares(masking, grid) for sides in pair}:
        if math.prod(sides) <= masking.min_keep:
            raise ConfigError(
                f"masking.min_keep {masking.min_keep}: on a grid of {grid}×{grid} patches sampler official draws "
                f"blocks of {sides[0]}×{sides[1]}, which are not larger; decrease masking.min_keep, or use "
                "--masking.sampler paper"
            )
