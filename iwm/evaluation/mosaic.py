"""Pictures made of rows of small views: titled bands of rows, packed side by side where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor

TILE, GAP, TITLE, LABEL = 0.62, 0.3, 0.3, 0.75
"""Inches: side of a view, space between bands, height of a title, width of the row names."""


@dataclass(frozen=True)
class Band:
    """A titled block of rows of equally many views."""

    title: str
    rows: dict[str, UInt8[Tensor, "n h w 3"]]
    """By the name that stands beside the row."""

    @property
    def columns(self) -> int:
        return len(next(iter(self.rows.values())))


def draw_bands(bands: Sequence[Band], path: Path, across: int = 0) -> None:
    """Write the bands as PNG, below each other; those with the same row names side by side while they fit.

    A line has room for `across` views, or for the widest band.
    """
    widest = max(across, *(band.columns for band in bands))
    lines: list[list[Band]] = []
    for band in bands:
        last = lines[-1] if lines else []
        columns = sum(each.columns for each in (*last, band))
        if last and last[0].rows.keys() == band.rows.keys() and columns <= widest:
            last.append(band)
        else:
            lines.append([band])
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
        for band in line:
            wide, down = TILE * band.columns, TILE * len(rows)
            ax = figure.add_axes((left / width, (top - down) / height, wide / width, down / height))
            ax.set_axis_off()
            ax.imshow(_sheet(band).numpy(), interpolation="nearest", aspect="auto")
            figure.text(left / width, (top + 0.06) / height, band.title, ha="left", va="bottom", fontsize=8)
            left += wide + GAP
        top -= TILE * len(rows) + GAP
    figure.savefig(path, dpi=160)


def _width(line: Sequence[Band]) -> float:
    return sum(TILE * band.columns for band in line) + GAP * (len(line) - 1)


def _sheet(band: Band) -> UInt8[Tensor, "y x 3"]:
    """The views on white, with a thin edge around each."""
    rows = []
    for views in band.rows.values():
        n, side, _, _ = views.shape
        edge = max(1, side // 32)
        framed = views.new_full((n, side + 2 * edge, side + 2 * edge, 3), 255)
        framed[:, edge:-edge, edge:-edge] = views
        rows.append(torch.cat(list(framed), dim=1))
    return torch.cat(rows)
