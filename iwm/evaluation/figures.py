"""Figures of titled blocks of small views, drawn side by side where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor

TILE, GAP, TITLE, LABEL = 0.62, 0.3, 0.3, 0.75
"""Side of a view, gap between blocks, height of a title, width of the row names (inches)."""


@dataclass(frozen=True)
class ImageBlock:
    """Block of views with a title and rows of equal length."""

    title: str
    rows: dict[str, UInt8[Tensor, "n h w 3"]]
    """Views by row name."""

    @property
    def columns(self) -> int:
        return len(next(iter(self.rows.values())))


def draw_image_blocks(blocks: Sequence[ImageBlock], path: Path, across: int = 0) -> None:
    """Write the blocks as PNG, one below the other; blocks with the same row names side by side while they fit.

    A line is `across` views wide, or as wide as the widest block.
    """
    widest = max(across, *(block.columns for block in blocks))
    lines: list[list[ImageBlock]] = []
    for block in blocks:
        last = lines[-1] if lines else []
        columns = sum(item.columns for item in (*last, block))
        if last and last[0].rows.keys() == block.rows.keys() and columns <= widest:
            last.append(block)
        else:
            lines.append([block])
    width = LABEL + max(_width(line) for line in lines)
    height = sum(TITLE + TILE * len(line[0].rows) + GAP for line in lines)
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height
    for line in lines:
        left, rows = LABEL, list(line[0].rows)
        top -= TITLE
        for r, name in enumerate(rows):
            y = (top - (r + 0.5) * TILE) / height
            figure.text((LABEL - 0.08) / width, y, name, ha="right", va="center", fontsize=7, color="0.35")
        for block in line:
            wide, down = TILE * block.columns, TILE * len(rows)
            ax = figure.add_axes((left / width, (top - down) / height, wide / width, down / height))
            ax.set_axis_off()
            ax.imshow(_sheet(block).numpy(), interpolation="nearest", aspect="auto")
            figure.text(left / width, (top + 0.06) / height, block.title, ha="left", va="bottom", fontsize=8)
            left += wide + GAP
        top -= TILE * len(rows) + GAP
    figure.savefig(path, dpi=160)


def _width(line: Sequence[ImageBlock]) -> float:
    return sum(TILE * block.columns for block in line) + GAP * (len(line) - 1)


def _sheet(block: ImageBlock) -> UInt8[Tensor, "y x 3"]:
    """Draw the views on white, with a thin margin around each."""
    rows = []
    for views in block.rows.values():
        n, side, _, _ = views.shape
        edge = max(1, side // 32)
        framed = views.new_full((n, side + 2 * edge, side + 2 * edge, 3), 255)
        framed[:, edge:-edge, edge:-edge] = views
        rows.append(torch.cat(list(framed), dim=1))
    return torch.cat(rows)
