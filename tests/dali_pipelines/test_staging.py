"""Loaders of shards at a URL: the batches of the local folder, bit for bit, however little of it is here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_server import FAULTS, FaultServer, serving
from pipeline_shards import photographs_and_noise, write_split

from dali_pipelines.loader import LoaderStateError, ViewBatch, ViewLoader
from dali_pipelines.read_order import ReadOrder
from dali_pipelines.seeds import derive_seed
from dali_pipelines.validation_loader import ValidationLoader
from dali_pipelines.views import SCENARIOS
from shards import cache as caches
from shards import urls
from shards.cache import local_folder
from shards.errors import ShardError
from shards.format import load_manifest

SMALL = replace(SCENARIOS["default"], size=32)
COUNTS = (5, 3, 6, 4, 5, 7, 3, 5, 4, 6, 5, 4, 3, 6, 5, 4, 6, 5, 4, 6)
SAMPLES = sum(COUNTS)
SEED = 5


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images in 20 tars of different sizes."""
    folder = tmp_path_factory.mktemp("many")
    write_split(folder, "train", photographs_and_noise(SAMPLES), COUNTS)
    return folder


@pytest.fixture
def server(many: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setattr(urls, "PAUSES", (0.01,) * 6)
    monkeypatch.setattr(urls, "TIME_LIMIT", 2.0)
    with serving(many) as server:
        yield server
    caches._SOURCES.clear()


def loader(folder: Path, **options: Any) -> ViewLoader:
    settings = {"batch_size": 4, "seed": SEED, "num_threads": 1, "shuffle_buffer": 6, "prefetch_queue_depth": 1}
    return ViewLoader(folder, "train", SMALL, **settings | options)


def equal(a: ViewBatch, b: ViewBatch) -> bool:
    same = all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    return same and list(a.keys) == list(b.keys)


def gigabytes(folder: Path, tars: float) -> float:
    return tars * max(shard.bytes for shard in load_manifest(folder, "train").shards) / 1e9


def visited(loader: ViewLoader, batches: int) -> list[str]:
    """Return the tars in the order in which samples of them come."""
    found: list[str] = []
    for _ in range(batches):
        for info in next(loader).keys._source_info.numpy():
            tar = bytes(info).split(b":")[0].decode().rpartition("/")[2]
            found += [tar] if not found or found[-1] != tar else []
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_order_told_is_that_of_the_reader_in_every_epoch(many: Path, world_size: int) -> None:
    for rank in range(world_size):
        read = loader(many, shuffle_buffer=1, rank=rank, world_size=world_size)
        order = ReadOrder(read._source, derive_seed(SEED))
        expected = visited(read, 3 * read.batches_per_epoch)
        names = [f"train-{stretch.shard:06d}.tar" for stretch in islice(order.stretches(0), len(expected))]
        assert names == expected
        later = [stretch.shard for stretch in islice(order.stretches(1), 20)]
        assert later != [stretch.shard for stretch in islice(order.stretches(0), 20)]


@pytest.mark.parametrize("tars", [None, 12])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_batches_are_those_of_the_folder_bit_for_bit(
    many: Path, server: FaultServer, tmp_path: Path, tars: int | None, rank: int, world_size: int
) -> None:
    limit = None if tars is None else gigabytes(many, tars)
    part = {"rank": rank, "world_size": world_size}
    there, here = loader(local_folder(server.url, tmp_path, limit), **part), loader(many, **part)
    for _ in range(3 * here.batches_per_epoch + 1):
        assert equal(next(there), next(here))


def test_training_begins_before_all_is_here(many: Path, server: FaultServer, tmp_path: Path) -> None:
    first = set(visited(loader(many, shuffle_buffer=1), 10))
    others = {shard.name for shard in load_manifest(many, "train").shards} - first
    assert len(others) > len(COUNTS) // 3
    server.plan = [(name, "stall") for name in others for _ in range(9)]
    there = loader(local_folder(server.url, tmp_path, None))
    assert len(next(there).keys) == 4
    assert {name for name in others if (there._source.folder / "staged" / name).exists()} == set()


@pytest.mark.parametrize("batches", [1, 7, 24, 31, 61])
def test_a_run_resumes_with_a_cold_cache(many: Path, server: FaultServer, tmp_path: Path, batches: int) -> None:
    here = loader(many)
    there = loader(local_folder(server.url, tmp_path / "first", None))
    for _ in range(batches):
        next(here), next(there)
    states = there.state_dict(), here.state_dict()
    assert states[0].keys() == states[1].keys()
    del there
    expected = [next(here) for _ in range(30)]
    # A state of the folder continues at the URL, and the other way round.
    for name, (state, limit) in {"a": (states[0], None), "b": (states[1], gigabytes(many, 12))}.items():
        resumed = loader(local_folder(server.url, tmp_path / name, limit), state=state)
        assert all(equal(next(resumed), batch) for batch in expected)
    resumed = loader(many, state=states[0])
    assert all(equal(next(resumed), batch) for batch in expected)


def read_positions(folder: Path) -> dict[str, int]:
    """Return how far each tar that this process has open has been read, for those that were (bytes)."""
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):
        path = Path(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        if path.parent == folder and path.suffix == ".tar":
            position = int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split()[1])
            found |= {path.name: position} if position else {}
    return found


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_tar_is_read_before_it_is_here(many: Path, server: FaultServer, tmp_path: Path, prefetch: int) -> None:
    folder = local_folder(server.url, tmp_path, gigabytes(many, 20.5))
    there = loader(folder, prefetch_queue_depth=prefetch)
    assert there._staged is not None
    order, place, seen = there._staged._order.stretches(0), 0, set[str]()
    ends: list[tuple[str, int]] = []
    for batch in range(60):
        next(there)
        while place < there._staged._needed:
            stretch = next(order)
            ends.append((f"train-{stretch.shard:06d}.tar", place))
            place += stretch.samples
        seen |= read_positions(folder).keys()
        assert seen <= {name for name, begin in ends if begin < there._staged._needed}, batch
    assert len(seen) == len(COUNTS), "the test has seen no reading"


def test_an_ordered_pass_has_the_samples_of_the_folder(many: Path, server: FaultServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": 32, "batch_size": 7, "num_threads": 1, "rank": 1, "world_size": 2}
    here = ValidationLoader(many, "train", **options)
    there = ValidationLoader(local_folder(server.url, tmp_path, gigabytes(many, 12)), "train", **options)
    for _ in range(2):
        for one, other in zip(here, there, strict=True):
            assert list(one.keys) == list(other.keys)
            assert torch.equal(one.images, other.images)


def test_faults_change_nothing(many: Path, server: FaultServer, tmp_path: Path) -> None:
    here = loader(many)
    server.plan = [(f"train-{number:06d}.tar", FAULTS[number % len(FAULTS)]) for number in range(len(COUNTS))]
    there = loader(local_folder(server.url, tmp_path, None))
    assert all(equal(next(there), next(here)) for _ in range(3 * here.batches_per_epoch))
    assert not server.plan, "not all faults were met"


def test_a_shard_that_stays_wrong_ends_the_training_by_its_name(
    many: Path, server: FaultServer, tmp_path: Path
) -> None:
    server.plan = [("train-000007.tar", "corrupt")] * 2
    there = loader(local_folder(server.url, tmp_path, None))
    with pytest.raises(ShardError, match=r"train-000007\.tar is not the file of the manifest"):
        list(islice(there, 3 * there.batches_per_epoch))


def test_a_cache_that_is_too_small_is_refused(many: Path, server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"data\.cache_gb .*: a process reads from up to .* GB of shards"):
        loader(local_folder(server.url, tmp_path, gigabytes(many, 2)))


def test_states_that_do_not_count_batches_are_for_folders_only(many: Path, server: FaultServer, tmp_path: Path) -> None:
    here = loader(many)
    next(here)
    old = {name: value for name, value in here.state_dict().items() if name != "batches"}
    assert equal(next(loader(many, state=old)), next(here))
    with pytest.raises(LoaderStateError, match="did not count batches") as error:
        loader(local_folder(server.url, tmp_path, None), state=old)
    assert error.value.different == {"batches"}
