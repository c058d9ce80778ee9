"""Loaders of parts of a split: exact on any number of ranks, after a resume, and at URLs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from fault_server import serving
from pipeline_shards import photographs_and_noise, write_split

from dali_pipelines.crops import CropSettings
from dali_pipelines.loader import CropLoader, LoaderStateError
from dali_pipelines.validation_loader import ValidationLoader
from shards import cache as caches
from shards.cache import local_folder
from shards.errors import ShardError
from shards.hold_out import key_position
from shards.split_part import SplitPart

ALL = [f"train{row:06d}" for row in range(47)]
HELD, OTHERS = SplitPart(5, others=False), SplitPart(5, others=True)
LOWEST = set(sorted(ALL, key=key_position)[:5])
OPTIONS: dict[str, Any] = {"num_threads": 1, "label": "row"}


def keys_of(folder: Path, part: SplitPart | None, world_size: int = 1) -> list[str]:
    keys: list[str] = []
    for rank in range(world_size):
        loader = ValidationLoader(
            folder, "train", size=32, batch_size=4, rank=rank, world_size=world_size, part=part, **OPTIONS
        )
        for batch in loader:
            assert batch.labels is not None
            assert [ALL[row] for row in batch.labels.tolist()] == list(batch.keys)
            keys += batch.keys
    return keys


def crops(folder: Path, part: SplitPart | None, state: dict[str, Any] | None = None, **options: Any) -> CropLoader:
    fixed = {"batch_size": 6, "seed": 3, "shuffle_buffer": 8}
    return CropLoader(folder, "train", CropSettings(size=32), part=part, state=state, **fixed | OPTIONS | options)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_are_exact_and_in_order_on_any_number_of_ranks(shards: Path, world_size: int) -> None:
    assert keys_of(shards, HELD, world_size) == sorted(LOWEST)
    assert keys_of(shards, OTHERS, world_size) == sorted(set(ALL) - LOWEST)


@pytest.mark.parametrize("count", [1, 23, 46])
def test_one_tar_has_parts_too(tmp_path: Path, count: int) -> None:
    write_split(tmp_path, "train", photographs_and_noise(47), per_shard=(47,))
    held = keys_of(tmp_path, SplitPart(count, others=False))
    assert held == sorted(sorted(ALL, key=key_position)[:count])
    assert sorted(held + keys_of(tmp_path, SplitPart(count, others=True))) == ALL


def test_training_never_sees_what_is_held_out(shards: Path) -> None:
    loaders = [crops(shards, OTHERS, rank=rank, world_size=2) for rank in range(2)]
    assert {loader.samples_per_epoch for loader in loaders} == {42}
    for _ in range(3):
        epoch = [key for loader in loaders for batch in islice(loader, loader.batches_per_epoch) for key in batch.keys]
        assert set(epoch) == set(ALL) - LOWEST


def test_a_resumed_loader_continues_and_one_of_another_part_refuses(shards: Path) -> None:
    loader = crops(shards, OTHERS)
    batches = [list(batch.keys) for batch in islice(loader, 9)]
    again = crops(shards, OTHERS)
    assert [list(batch.keys) for batch in islice(again, 4)] == batches[:4]
    resumed = crops(shards, OTHERS, again.state_dict())
    assert [list(batch.keys) for batch in islice(resumed, 5)] == batches[4:]
    for other in (None, SplitPart(6, others=True)):
        with pytest.raises(LoaderStateError, match="shards was"):
            crops(shards, other, again.state_dict())


def test_parts_at_a_url_are_those_of_the_folder(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(shards) as server:
        remote = local_folder(server.url, tmp_path, None)
        assert keys_of(remote, HELD) == sorted(LOWEST)
        local, staged = crops(shards, OTHERS), crops(remote, OTHERS)
        for expected, batch in islice(zip(local, staged, strict=False), 16):
            assert list(batch.keys) == list(expected.keys)
    caches._SOURCES.clear()


def test_impossible_parts_are_refused(shards: Path) -> None:
    with pytest.raises(ShardError, match="has 47 images, of which 47 cannot be held out"):
        keys_of(shards, SplitPart(47, others=False))
    with pytest.raises(ShardError, match="1 images of split 'train' are read by 2 processes"):
        keys_of(shards, SplitPart(1, others=False), world_size=2)
