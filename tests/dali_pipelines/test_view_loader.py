"""The training loader: samples of each rank, their order, resuming and errors."""

from __future__ import annotations

import io
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_shards import photographs_and_noise, write_split

from dali_pipelines.loader import LoaderStateError, ViewBatch, ViewLoader
from dali_pipelines.views import SCENARIOS, Views
from shards.errors import ShardError
from shards.format import load_manifest

SMALL = replace(SCENARIOS["default"], size=32)


def loader(folder: Path, **settings: Any) -> ViewLoader:
    return ViewLoader(
        folder, "train", settings.pop("views", SMALL), **{"batch_size": 8, "seed": 5, "num_threads": 1} | settings
    )


def epoch_keys(loader: ViewLoader) -> list[str]:
    return [key for _ in range(loader.batches_per_epoch) for key in next(loader).keys]


def copied(batch: ViewBatch) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (batch.source, batch.target, batch.params)]


def equal(a: ViewBatch, b: ViewBatch) -> bool:
    same = all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    return same and list(a.keys) == list(b.keys)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_epoch_has_every_sample_on_one_rank_and_padding_repeats_a_ranks_last(
    shards: Path, world_size: int
) -> None:
    ranks = [loader(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = ranks[0].batches_per_epoch
    assert steps == math.ceil(math.ceil(47 / world_size) / 8)
    for _ in range(3):
        keys = [epoch_keys(rank) for rank in ranks]
        seen = [set(k) for k in keys]
        assert sum(len(s) for s in seen) == len(set().union(*seen)) == 47
        for of_rank in keys:
            assert len(of_rank) == steps * 8
            repeated = {key: n - 1 for key, n in Counter(of_rank).items() if n > 1}
            assert len(repeated) <= 1
            assert sum(repeated.values()) == steps * 8 - len(set(of_rank))
            assert all(of_rank[-n:] == [key] * n for key, n in repeated.items())


def test_ranks_stay_in_step_when_one_has_a_batch_more(tmp_path: Path) -> None:
    write_split(tmp_path, "train", photographs_and_noise(9, side=40), per_shard=(2, 7))
    ranks = [loader(tmp_path, rank=rank, world_size=2, batch_size=4) for rank in range(2)]
    assert [rank.batches_per_epoch for rank in ranks] == [2, 2]
    for _ in range(4):
        keys = [epoch_keys(rank) for rank in ranks]
        assert sorted(set(keys[0]) | set(keys[1])) == [f"train{i:06d}" for i in range(9)]
        assert not set(keys[0]) & set(keys[1])


def test_epochs_come_in_new_orders_and_ranks_get_new_samples(shards: Path) -> None:
    ranks = [loader(shards, rank=rank, world_size=2) for rank in range(2)]
    first, second, third = ([epoch_keys(rank) for rank in ranks] for _ in range(3))
    assert first[0] != second[0] != third[0]
    assert set(first[0]) != set(second[0]) or set(second[0]) != set(third[0])


def test_the_seed_decides_everything_and_each_rank_augments_differently(shards: Path) -> None:
    assert all(equal(a, b) for a, b, _ in zip(loader(shards), loader(shards), range(8), strict=False))
    other = loader(shards, seed=6)
    assert not equal(next(loader(shards)), next(other))
    ranks = [next(loader(shards, rank=rank, world_size=2)) for rank in range(2)]
    assert not (ranks[0].params[:, 7:] == ranks[1].params[:, 7:]).all(1).any()


@pytest.mark.parametrize("stopped_after", [0, 3, 6, 8, 14])
def test_a_restored_loader_goes_on_bit_for_bit_within_and_across_epochs(
    shards: Path, device: str, stopped_after: int
) -> None:
    whole = loader(shards, views=Views(size=32), device=device)
    for _ in range(stopped_after):
        next(whole)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    restored = loader(shards, views=Views(size=32), device=device, state=state)
    for _ in range(10):
        assert equal(next(whole), next(restored))


def test_prefetch_and_threads_do_not_change_the_stream(shards: Path) -> None:
    started = loader(shards, prefetch_queue_depth=1)
    for _ in range(3):
        next(started)
    resumed = loader(shards, prefetch_queue_depth=3, num_threads=2, state=started.state_dict())
    for _ in range(8):
        assert equal(next(started), next(resumed))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 6}),
        ("rank", {"rank": 1, "world_size": 2}),
        ("world_size", {"world_size": 2}),
        ("views", {"views": replace(SMALL, size=40)}),
        ("shuffle_buffer", {"shuffle_buffer": 4}),
        ("label", {"label": "class"}),
    ],
)
def test_a_state_of_other_settings_is_refused_by_name(shards: Path, name: str, settings: dict[str, Any]) -> None:
    state = loader(shards).state_dict()
    with pytest.raises(LoaderStateError, match=rf"{name} was .*, is "):
        loader(shards, state=state, **settings)


def test_a_state_of_other_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    write_split(tmp_path, "train", photographs_and_noise(47), per_shard=(9, 11, 13, 4, 10))
    with pytest.raises(LoaderStateError, match="shards was"):
        loader(tmp_path, state=loader(shards).state_dict())


def test_a_kept_batch_is_never_overwritten(shards: Path, device: str) -> None:
    endless = loader(shards, device=device)
    kept = [next(endless) for _ in range(4)]
    before = [copied(batch) for batch in kept]
    for _ in range(30):
        next(endless)
    for batch, values in zip(kept, before, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(batch[:3], values, strict=True))


def test_a_batch_outlives_its_loader(shards: Path, device: str) -> None:
    endless = loader(shards, device=device)
    batch = next(endless)
    before = copied(batch)
    del endless
    assert all(torch.equal(now, then) for now, then in zip(batch[:3], before, strict=True))


def test_labels_and_keys_belong_to_the_images(shards: Path) -> None:
    batch = next(loader(shards, label="row"))
    assert batch.label is not None
    assert batch.label.dtype == torch.int64
    assert [f"train{row:06d}" for row in batch.label.tolist()] == list(batch.keys)
    assert batch.keys[2:4][1] == batch.keys[3]
    assert next(loader(shards)).label is None


def test_the_shard_check_comes_before_the_first_batch(shards: Path, tmp_path: Path) -> None:
    manifest = load_manifest(shards, "train")
    first, second = manifest.shards[:2]

    def broken(name: str) -> Path:
        return Path(shutil.copytree(shards, tmp_path / name))

    missing = broken("missing")
    (missing / first.name).unlink()
    with pytest.raises(ShardError, match=rf"{first.name} is missing"):
        loader(missing)
    cut = broken("cut")
    (cut / first.name).write_bytes((cut / first.name).read_bytes()[:-512])
    with pytest.raises(ShardError, match=rf"{first.name} has .* bytes"):
        loader(cut)
    stale = broken("stale")
    shutil.copy(stale / second.index, stale / first.index)
    with pytest.raises(ShardError, match=first.index):
        loader(stale)
    with pytest.raises(ShardError, match="5 shards for 6 processes"):
        loader(shards, rank=0, world_size=6)
    with pytest.raises(ShardError, match="no label column 'species'"):
        loader(shards, label="species")


def test_an_unreadable_image_is_an_error_that_says_how_to_find_it(tmp_path: Path) -> None:
    images = photographs_and_noise(8, side=40)
    images[5] = b"this is no image"
    write_split(tmp_path, "train", images, per_shard=(8,))
    with pytest.raises(ShardError, match="iwm verify"):
        next(loader(tmp_path))
