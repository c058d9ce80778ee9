"""Baseline loaders: they do the stated work on the same JPEGs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import loaders
import pytest
import simplejpeg
import torch
from baselines import jpeg_decode, webdataset_loader
from baselines.jpeg_decode import stored_images
from environment import BenchmarkError
from loaders import LoaderWork, chosen_baselines, measured_loaders
from options import LoaderOptions
from PIL import Image
from rich.console import Console

from dali_pipelines.augmentations import NO_PHOTOMETRIC, PhotometricConfig
from dali_pipelines.views import Views
from tests.benchmarks.tile_shards import tile_shards

ROOT = Path(__file__).parents[2]
TILES = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards whose tiles all have different widths."""
    boxes = ((4 * i, 4 * i, 4 * i + 100 + i, 4 * i + 90) for i in range(TILES))
    return tile_shards(tmp_path_factory.mktemp("baselines"), boxes)


def test_every_jpeg_of_the_split_is_read_once_and_whole(shards: Path) -> None:
    widths = {Image.open(io.BytesIO(place.read())).width for place in stored_images(shards, "train")}
    assert widths == {100 + i for i in range(TILES)}


def test_webdataset_makes_the_same_two_views(shards: Path) -> None:
    always = PhotometricConfig(1.0, 0.4, 0.4, 0.2, 0.1, 1.0, 1.0, (0.1, 2.0), 1.0)
    torch.manual_seed(0)
    source, target = next(
        iter(webdataset_loader.dataset(shards, "train", Views(size=48, source=always, target=NO_PHOTOMETRIC), 4))
    )
    assert source.shape == target.shape == (4, 3, 48, 48)
    assert source.dtype == target.dtype == torch.uint8
    assert (source[:, 0] == source[:, 1]).all(), "the source is grey"
    assert not (target[:, 0] == target[:, 1]).all()


def test_webdataset_takes_its_batches_from_workers_without_end(shards: Path) -> None:
    stream: Iterator[int] = webdataset_loader.batches(shards, "train", Views(size=32), 8, 1)
    assert list(islice(stream, 2 * TILES // 8)) == [8] * (2 * TILES // 8)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_limit_decodes_whole_batches_in_every_thread(
    shards: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: decoded.append(decode(*a, **k).shape))
    assert list(islice(jpeg_decode.batches(shards, "train", 10, threads), TILES // 10)) == [10] * (TILES // 10)
    assert {(90, 100 + i, 3) for i in range(TILES)} <= set(decoded)


def test_all_means_what_is_installed_and_the_rest_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "find_spec", lambda name: None if name == "ffcv" else find_spec(name))
    said = Console(record=True, width=200, quiet=False, file=io.StringIO())
    assert chosen_baselines(LoaderOptions(baseline=("all",)), said) == ("torchvision", "webdataset", "decode")
    assert "without ffcv: the package ffcv is not installed here" in said.export_text()
    assert chosen_baselines(LoaderOptions(baseline=("decode", "torchvision")), said) == ("torchvision", "decode")
    assert chosen_baselines(LoaderOptions(baseline=("none",)), said) == ()


def test_a_baseline_that_is_not_there_is_refused_with_the_way_to_install_it(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"--baseline ffcv: .* not installed here .*pip install ffcv"):
        measured_loaders(LoaderWork(shards, "train", Views(), 8, 1), "cpu", ("ffcv",), Console())


def test_none_beside_a_baseline_is_a_mistake() -> None:
    with pytest.raises(BenchmarkError, match="--baseline none decode: 'none' cannot be combined with others"):
        chosen_baselines(LoaderOptions(baseline=("none", "decode")), Console())


@pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV is not installed")
def test_ffcv_holds_the_same_bytes_and_makes_both_views_of_them(shards: Path, tmp_path: Path) -> None:
    from baselines import ffcv_loader

    file = tmp_path / "images.beton"
    ffcv_loader.write_dataset(shards, "train", file, 1)
    content = file.read_bytes()
    assert all(place.read() in content for place in stored_images(shards, "train"))
    assert list(islice(ffcv_loader.batches(file, Views(size=32), 8, 1), 6)) == [8] * 6
