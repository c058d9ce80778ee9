"""Figures keep every image in its place, with its words; maps keep every pixel."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iwm.evaluation.colour_scale import ColourScale
from iwm.evaluation.figures import MAX_SIDE, FigureTile, TileBlock, TileColumn, TileFigure, TileGroup, write_figures


def _level(level: int, side: int = 8) -> Tensor:
    return torch.full((side, side, 3), level, dtype=torch.uint8)


def _figure(*columns: TileColumn) -> TileFigure:
    return TileFigure("title", "caption", [TileGroup("group", [TileBlock("block", columns, rows=("true", "nearest"))])])


def _images(output: Path, stored: dict[str, Any]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(output.with_name(stored["tiles"])) as archive:
        return {
            name: np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in archive.namelist()
        }


def test_views_stay_in_their_places_and_equal_ones_are_stored_once(tmp_path: Path) -> None:
    levels = range(0, 240, 40)
    columns = [
        TileColumn(
            str(level), (FigureTile(_level(level), f"true {level}"), FigureTile(_level(200 - level), f"near {level}"))
        )
        for level in levels
    ]
    output = tmp_path / "sweep.json"
    stored = write_figures([_figure(*columns)], output)
    images = _images(output, stored)
    assert len(images) == len(levels)
    shown = stored["figures"][0]["groups"][0]["blocks"][0]["columns"]
    for level, column in zip(levels, shown, strict=True):
        true, near = column["tiles"]
        assert (column["title"], true["alt"], near["alt"]) == (str(level), f"true {level}", f"near {level}")
        assert images[true["image"]].mean() == pytest.approx(level, abs=2)
        assert images[near["image"]].mean() == pytest.approx(200 - level, abs=2)


def test_a_map_keeps_every_pixel_and_a_large_view_is_reduced(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (9, 9, 3), generator=generator, dtype=torch.uint8)
    column = TileColumn("", (FigureTile(noise, "map", exact=True), FigureTile(_level(9, side=300), "view")))
    stored = write_figures([_figure(column)], tmp_path / "maps.json")
    images = _images(tmp_path / "maps.json", stored)
    exact, view = stored["figures"][0]["groups"][0]["blocks"][0]["columns"][0]["tiles"]
    assert (images[exact["image"]] == noise.numpy()).all()
    assert images[view["image"]].shape == (MAX_SIDE, MAX_SIDE, 3)


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_figures([_figure(TileColumn("", (FigureTile(_level(7), "view"),)))], tmp_path / f"{name}.json")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_the_numbers_along_a_scale_are_the_values_of_its_colours() -> None:
    scale = ColourScale(0.0, 8.0, power=0.5)
    bar = scale.bar("attention")
    assert [text for _, text in bar.ticks] == ["0.00", "0.50", "2.00", "4.50", "8.00"]
    for at, text in bar.ticks:
        place = round(at * (bar.strip.image.shape[1] - 1))
        colour = scale.colours(torch.tensor([[float(text)]]))[0, 0].int()
        assert (bar.strip.image[0, place].int() - colour).abs().max() <= 3
    outside = scale.colours(torch.tensor([[-1.0, 0.0, 8.0, 99.0]]))[0]
    assert torch.equal(outside[0], outside[1])
    assert torch.equal(outside[2], outside[3])
    assert not torch.equal(outside[1], outside[2])
