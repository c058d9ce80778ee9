"""Labels that are missing or not in the manifest's classes give one line with the sample and the remedy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline_shards import photographs_and_noise, write_split

from dali_pipelines.crops import CropSettings
from dali_pipelines.loader import CropLoader, ViewLoader
from dali_pipelines.validation_loader import ValidationLoader
from dali_pipelines.views import Views
from shards.errors import ShardError
from shards.format import load_manifest, save_manifest

COMMON: dict[str, Any] = {"batch_size": 6, "num_threads": 1, "label": "class"}

LOADERS: dict[str, Callable[[Path], Any]] = {
    "views": lambda folder: ViewLoader(folder, "train", Views(size=32), seed=0, **COMMON),
    "crops": lambda folder: CropLoader(folder, "train", CropSettings(size=32), seed=0, **COMMON),
    "centre crops": lambda folder: iter(ValidationLoader(folder, "train", size=32, **COMMON)),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write six samples whose classes are 0 to 5."""
    write_split(tmp_path, "train", photographs_and_noise(6, side=64), [6])
    return tmp_path


def put_label(folder: Path, old: bytes, new: bytes) -> None:
    """Overwrite one sample's class in its tar without changing any other byte."""
    tar = folder / "train-000000.tar"
    content = tar.read_bytes()
    before, after = (label.ljust(512, b"\0") for label in (old, new))
    assert content.count(before) >= 1
    tar.write_bytes(content.replace(before, after, 1))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("label", ["9", "x"])
def test_a_label_that_is_no_class_names_the_sample(shards: Path, name: str, label: str) -> None:
    manifest = load_manifest(shards, "train")
    manifest.columns[0].classes[:] = manifest.columns[0].classes[:6]
    save_manifest(shards, manifest)
    put_label(shards, b"4", label.encode())
    with pytest.raises(
        ShardError, match=rf"train000004 of split 'train' has label '{label}'.*'class' are 0 to 5; remake"
    ):
        next(LOADERS[name](shards))


@pytest.mark.parametrize("name", LOADERS)
def test_a_sample_without_its_class_is_reported_with_the_command_that_finds_it(shards: Path, name: str) -> None:
    """Rename the component in the index and update the manifest's hash of the index."""
    index = shards / "train-000000.idx"
    index.write_bytes(index.read_bytes().replace(b" cls ", b" clx ", 1))
    manifest = load_manifest(shards, "train")
    hashed = hashlib.sha256(index.read_bytes()).hexdigest()
    save_manifest(shards, replace(manifest, shards=[replace(manifest.shards[0], index_sha256=hashed)]))
    with pytest.raises(ShardError, match=r"train-000000\.idx\" line 1 .*iwm verify"):
        next(LOADERS[name](shards))
