"""Tensors of a ViT by timm's names: the shapes that they determine, and comparison with those of a module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from iwm.models.external.formats import ExternalCheckpointError


def shape_of(state: Mapping[str, Any], key: str, dimensions: int, path: Path) -> tuple[int, ...]:
    """Return a tensor's shape. Raises ExternalCheckpointError where it is missing or has another number of axes."""
    if key not in state:
        raise ExternalCheckpointError(f"{path} does not match the ViT: {key} is missing")
    if not isinstance(state[key], Tensor) or state[key].ndim != dimensions:
        raise ExternalCheckpointError(f"{path} does not match the ViT: {key} does not have {dimensions} dimensions")
    return tuple(state[key].shape)


def grid_of(state: Mapping[str, Any], key: str, prefix: int, path: Path) -> int:
    """Return the number of patches along a side of the image that the positions were made for.

    prefix: number of positions before those of the patches. Raises ExternalCheckpointError where the others are not a
    square.
    """
    count = shape_of(state, key, 3, path)[1] - prefix
    grid = math.isqrt(max(count, 0))
    if grid == 0 or grid**2 != count:
        raise ExternalCheckpointError(f"{path} does not match the ViT: {key} has {count} positions, not a square")
    return grid


def depth_of(state: Mapping[str, Any], blocks: str) -> int:
    """Return the number of blocks, at least 0, whose names begin with `blocks` and their number."""
    numbers = (re.match(rf"{blocks}\.(\d+)\.", key) for key in state)
    return max((1 + int(number[1]) for number in numbers if number), default=0)


def mlp_ratio_of(hidden: int, width: int) -> float:
    """Return the ratio from which timm computes this hidden width, as int(ratio · width)."""
    exact = hidden / width
    return exact if int(exact * width) == hidden else (hidden + 0.5) / width


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor that is missing, unexpected or of another shape."""
    shapes = {key: tuple(value.shape) if isinstance(value, Tensor) else () for key, value in found.items()}
    problems = [f"{key} is missing" for key in expected if key not in shapes]
    problems += [f"{key} is unexpected" for key in shapes if key not in expected]
    problems += [
        f"{key} is {list(shapes[key])}, not {list(value.shape)}"
        for key, value in expected.items()
        if key in shapes and shapes[key] != tuple(value.shape)
    ]
    return problems


def abbreviated(problems: list[str]) -> str:
    """Return the first three problems, and the number of the others."""
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
