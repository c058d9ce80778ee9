"""Images and targets in training's form: for measuring speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iwm.downstream.pretrained import Pretrained

Example = Callable[[int], tuple[Tensor, list[Tensor]]]
"""Pixels and targets of so many images of each task, the tasks one after the other."""


def labelled(pretrained: Pretrained, classes: Sequence[int], device: torch.device) -> Example:
    """Return what makes images with soft targets. classes: their number, by task."""

    def made(count: int) -> tuple[Tensor, list[Tensor]]:
        size = pretrained.size
        pixels = torch.randint(0, 256, (count * len(classes), size, size, 3), device=device).float()
        return pixels, [torch.full((count, number), 1 / number, device=device) for number in classes]

    return made


def masked(pretrained: Pretrained, device: torch.device) -> Example:
    """Return what makes images with masks, all of class 0."""

    def made(count: int) -> tuple[Tensor, list[Tensor]]:
        sides = (count, pretrained.size, pretrained.size)
        pixels = torch.randint(0, 256, (*sides, 3), dtype=torch.uint8, device=device)
        return pixels, [torch.zeros(sides, dtype=torch.uint8, device=device)]

    return made
