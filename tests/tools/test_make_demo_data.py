"""The demo's data: same bytes for the same seed, correct labels and masks, no photograph in both splits."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.make_demo_data import COLOURS, PHOTOGRAPHS, SHAPES, TILE, draw_tile, make_split, tiles_csv

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_data.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_split(folder, "train", 96, seed=3)
    make_split(folder, "val", 12, seed=3)
    return folder


def _rows(folder: Path, split: str) -> list[dict[str, str]]:
    with open(tiles_csv(folder, split), newline="") as file:
        return list(csv.DictReader(file))


def test_no_photograph_is_in_both_splits() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])


def test_both_views_of_the_motorcycle_are_in_one_split() -> None:
    assert [sum("motorcycle" in name for name in split) for split in PHOTOGRAPHS.values()] == [2, 0]


def test_every_row_has_an_image_a_mask_and_all_labels(made: Path) -> None:
    for split, tiles in (("train", 96), ("val", 12)):
        rows = _rows(made, split)
        assert len(rows) == tiles
        for row in rows:
            assert all(row.values())
            assert Image.open(made / split / row["path"]).size == (TILE, TILE)
            assert Image.open(made / split / row["path"]).mode == "RGB"
            assert Image.open(made / split / row["mask"]).size == (TILE, TILE)


def test_the_mask_holds_the_objects_colour_at_the_place_its_label_says(made: Path) -> None:
    for row in _rows(made, "train"):
        mask = np.asarray(Image.open(made / "train" / row["mask"]))
        assert set(np.unique(mask)) == {0, 1 + sorted(COLOURS).index(row["colour"])}
        assert 0.01 < (mask > 0).mean() < 0.4
        y, x = (axis.mean() for axis in np.nonzero(mask))
        vertical, horizontal = row["place"].split("-")
        if abs(y - TILE / 2) > 4:
            assert vertical == ("top" if y < TILE / 2 else "bottom")
        if abs(x - TILE / 2) > 4:
            assert horizontal == ("left" if x < TILE / 2 else "right")


def test_the_object_has_the_colour_its_label_says() -> None:
    hues = {"red": 0, "yellow": 1 / 6, "green": 2 / 6, "cyan": 3 / 6, "blue": 4 / 6, "magenta": 5 / 6}
    for index in range(40):
        tile = draw_tile("train", index, seed=0)
        inside = np.asarray(tile.mask) > 0
        hue = np.median(_turned(np.asarray(tile.image.convert("HSV"))[..., 0][inside], hues[tile.labels["colour"]]))
        assert abs(hue) < 1 / 12, tile.labels


def _turned(hue: np.ndarray, about: float) -> np.ndarray:
    """Return the difference of a hue (0 to 255) from `about` (turns), in turns in [-0.5, 0.5)."""
    return (hue / 256 - about + 0.5) % 1 - 0.5


def test_every_class_is_drawn(made: Path) -> None:
    assert {row["label"] for row in _rows(made, "train")} == set(SHAPES)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_tiles(made: Path, tmp_path: Path) -> None:
    make_split(tmp_path / "same", "val", 12, seed=3)
    make_split(tmp_path / "other", "val", 12, seed=4)
    names = [str(path.relative_to(made)) for path in sorted((made / "val").iterdir())]
    assert len(names) == 25
    assert all((made / name).read_bytes() == (tmp_path / "same" / name).read_bytes() for name in names)
    assert not any(
        (made / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
        for name in names
        if name.endswith(".jpg")
    )


def test_an_output_that_is_a_file_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = subprocess.run([sys.executable, str(TOOL), str(tmp_path / "file")], capture_output=True, text=True)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert str(tmp_path / "file") in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
