"""Figures of small images with words, stored with a result; the page lays them out (iwm/report/picture_grid.py).

A figure has groups of blocks, a block has columns, and a column has one tile for each row of the block. `write_figures`
writes all images of a result as WebP files into one zip next to the JSON, which keeps everything else: titles,
captions, the text alternative of each image, and the image's name in the zip.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from shards.atomic import write_atomically

MAX_SIDE = 128
"""Largest side of a stored view (pixels)."""
QUALITY = 90
"""Quality of the WebP files of views (0 to 100)."""
COMPRESSION_EFFORT = 6
"""Effort of the WebP encoder (0 to 6)."""


@dataclass(frozen=True)
class FigureTile:
    """One image of a figure."""

    image: UInt8[Tensor, "h w 3"]
    alt: str
    """Description of what is shown, for readers who do not see the image."""
    marked: bool = False
    """True where the image gets the figure's mark."""
    exact: bool = False
    """True for maps and matrices: stored without loss, each pixel shown as a square."""


@dataclass(frozen=True)
class TileColumn:
    """Tiles below each other, one for each row of the block."""

    title: str
    tiles: tuple[FigureTile, ...]


@dataclass(frozen=True)
class TileBlock:
    """Columns next to each other. On a narrow screen they continue on the next line."""

    title: str
    columns: Sequence[TileColumn]
    rows: tuple[str, ...] = ()
    """Names of the rows; empty for a single row without a name."""
    notes: tuple[str, ...] = ()
    """Lines below the columns."""


@dataclass(frozen=True)
class TileGroup:
    """Blocks that belong together, for example those of one photograph."""

    title: str
    blocks: Sequence[TileBlock]


@dataclass(frozen=True)
class Matrix:
    """Square matrix as an image, with one view and its name for each of the equal parts of the rows."""

    tile: FigureTile
    labels: Sequence[tuple[str, FigureTile]]


@dataclass(frozen=True)
class ScaleBar:
    """Scale of a figure's colours: a strip of the colours, with numbers along it."""

    label: str
    strip: FigureTile
    ticks: Sequence[tuple[float, str]]
    """Position along the strip (0 to 1), and the number there."""


@dataclass(frozen=True)
class TileFigure:
    """Figure of the page: groups of tiles, or a matrix."""

    title: str
    caption: str
    groups: Sequence[TileGroup] = ()
    matrix: Matrix | None = None
    scale: ScaleBar | None = None
    mark: str = ""
    """Meaning of the mark on tiles; empty where no tile is marked."""
    tile_width: int = 64
    """Width at which a tile is shown (CSS pixels)."""
    folded: bool = False
    """True where the page shows the figure only on request."""


def write_figures(figures: Sequence[TileFigure], output: Path) -> dict[str, Any]:
    """Write the images to the zip next to `output`, the result's JSON; return `tiles`, its name, and `figures`."""
    images = _Images()
    records = [_record(figure, images) for figure in figures]
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for encoded, name in images.names.items():
            # A fixed date, so that equal results are equal files.
            archive.writestr(zipfile.ZipInfo(name), encoded)
    path = output.with_suffix(".zip")
    write_atomically(path, content.getvalue())
    return {"tiles": path.name, "figures": records}


class _Images:
    """Encoded images and their names in the zip; equal images are stored once."""

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}

    def add(self, tile: FigureTile) -> dict[str, Any]:
        """Encode a tile's image and return the tile's record."""
        encoded = _encode(tile)
        name = self.names.setdefault(encoded, f"{len(self.names):04d}.webp")
        return {"image": name, "alt": tile.alt, "marked": tile.marked, "exact": tile.exact}


def _encode(tile: FigureTile) -> bytes:
    image, content = Image.fromarray(tile.image.cpu().numpy()), BytesIO()
    if tile.exact:
        image.save(content, "webp", lossless=True, quality=100, method=COMPRESSION_EFFORT)
    else:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(content, "webp", quality=QUALITY, method=COMPRESSION_EFFORT)
    return content.getvalue()


def _record(figure: TileFigure, images: _Images) -> dict[str, Any]:
    matrix, scale = figure.matrix, figure.scale
    return {
        "title": figure.title,
        "caption": figure.caption,
        "groups": [
            {"title": group.title, "blocks": [_block(block, images) for block in group.blocks]}
            for group in figure.groups
        ],
        "matrix": matrix
        and {
            "tile": images.add(matrix.tile),
            "labels": [{"name": name, "tile": images.add(tile)} for name, tile in matrix.labels],
        },
        "scale": scale
        and {
            "label": scale.label,
            "strip": images.add(scale.strip),
            "ticks": [{"at": at, "text": text} for at, text in scale.ticks],
        },
        "mark": figure.mark,
        "tile_width": figure.tile_width,
        "folded": figure.folded,
    }


def _block(block: TileBlock, images: _Images) -> dict[str, Any]:
    columns = [
        {"title": column.title, "tiles": [images.add(tile) for tile in column.tiles]} for column in block.columns
    ]
    return {"title": block.title, "rows": list(block.rows), "columns": columns, "notes": list(block.notes)}
