"""The packed table of samples, and plans made from it: every sample returns as it came, in memory or from a file."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import shards.growing
import shards.plan
import shards.samples
from shards.errors import ShardError
from shards.format import Column
from shards.growing import GrowingBytes
from shards.hold_out import TRAIN, VAL, hold_out, key_position
from shards.listing import LABEL, SampleList, fit_key, sample_key
from shards.plan import ShardSize, plan_shards
from shards.samples import FileRef, Sample, SampleTable
from shards.sources.file_lists import make_resolver
from shards.sources.text_list import list_lines
from tests.disks import small_disk

KEY_LENGTH = 96
"""Characters of a key beside the components jpg and cls."""


@pytest.fixture(params=["memory", "file"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pack seven samples at a time, in memory or in temporary files."""
    monkeypatch.setattr(shards.samples, "_BLOCK", 7)
    if request.param == "file":
        monkeypatch.setattr(shards.growing, "SPILL_AT", 1)
    return request.param


def named(name: str, place: int) -> Sample:
    """Return a sample; every third is in a tar, every fourth has a mask."""
    inside = place % 3 == 0
    image = FileRef(
        f"/data/{place % 2}.tar" if inside else "/data", name, 512 * place if inside else None, 2**33 + place
    )
    mask = FileRef("/masks", f"{name}.png", None, place) if place % 4 == 0 else None
    return Sample(sample_key(os.path.splitext(name)[0]), image, (f"class {place % 5}",), mask)


NAMES = [
    "n01440764/n01440764_10026.JPEG", "owl/night 1.jpg", "a.b/c.d.jpg", "ü/é.jpg", "100%25/x~1.jpg", "a\nb/c.jpg",
    os.fsdecode(b"\xff\xfe/1.jpg"), "long/" + 40 * "name" + ".jpg", "x", "", "%2F/..jpg",
]  # fmt: skip


def many(count: int) -> list[Sample]:
    samples = [named(f"{place}/{NAMES[place % len(NAMES)]}", place) for place in range(count)]
    kept = FileRef("/wds/0.tar", "0.tar/kept%20~1.jpg", 1, 1)
    samples += [named(name, place) for place, name in enumerate(NAMES)]
    # A key that the source has as it is, and keys that occur before: equal, and equal only once shortened.
    samples += [Sample("kept%20~1", kept, ("class 1",)), *samples[5:9]]
    return [*samples, Sample(fit_key(100 * "k", KEY_LENGTH), kept, ("class 0",)), Sample(100 * "k", kept, ("class 0",))]


def test_samples_return_as_they_came(storage: str) -> None:
    samples = many(100)
    table = SampleTable(samples[:50])
    assert list(table) == samples[:50]
    table.extend(samples[50:])
    assert (len(table), list(table), list(table.read_keys())) == (len(samples), samples, [s.key for s in samples])
    assert (table._samples._file is not None) == (storage == "file")
    rows = np.random.default_rng(0).permutation(len(samples))[:30]
    assert table.read(rows) == [samples[row] for row in rows]
    part = table.take(rows).take(np.array([3, 1, 3]))
    assert list(part) == [samples[rows[row]] for row in (3, 1, 3)]
    assert list(part.contents()) == [(s.key, s.image.size, s.labels, s.mask.size if s.mask else None) for s in part]
    with pytest.raises(ValueError, match="cannot grow"):
        part.append(samples[0])
    table.drop_labels()
    table.append(samples[0])
    assert list(table) == [*(s._replace(labels=()) for s in samples), samples[0]]
    assert next(iter(part)).labels == samples[rows[3]].labels


def plan_of_lists(samples: list[Sample], seed: int, columns: list[Column]) -> tuple[list[Sample], list[str], str]:
    """Return shuffled samples, names of duplicates and the digest, without tables."""
    kept: dict[str, Sample] = {}
    duplicates = []
    for sample in samples:
        key = fit_key(sample.key, KEY_LENGTH)
        if key in kept:
            duplicates.append(f"{sample.image.name} has the key '{key}' of {kept[key].image.name}")
        else:
            kept[key] = sample._replace(key=key)
    digest = hashlib.sha256(repr([(column.name, column.classes) for column in columns]).encode())
    for key, sample in kept.items():
        digest.update(repr((key, sample.image.size, sample.labels, sample.mask and sample.mask.size)).encode())
    unique = list(kept.values())
    return [unique[row] for row in np.random.default_rng(seed).permutation(len(unique))], duplicates, digest.hexdigest()


@pytest.mark.parametrize("equal_hashes", [False, True])
def test_a_plan_is_that_of_plain_lists(storage: str, equal_hashes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if equal_hashes:
        monkeypatch.setattr(shards.plan, "hash", lambda key: 7, raising=False)
    samples, columns = many(60), [Column(LABEL, "cls", [f"class {n}" for n in range(5)])]
    order, duplicates, digest = plan_of_lists(samples, 3, columns)
    plan = plan_shards(SampleList(columns, SampleTable(samples)), None, 3, None, ShardSize(min_shards=6))
    assert [sample for shard in range(plan.shards) for sample in plan.shard(shard)] == order
    assert [f"{path} {reason}" for path, reason in plan.rejections] == duplicates
    assert len(duplicates) == 5
    assert plan.digest == digest
    assert plan.read == len(samples)
    assert [plan.samples_of(shard) for shard in range(plan.shards)] == [len(plan.shard(n)) for n in range(plan.shards)]
    masks = sum(sample.mask.size for sample in order if sample.mask)
    assert plan.estimated_bytes == sum(sample.image.size for sample in order) + masks + 2 * 1024 * len(order)
    resized = plan_shards(SampleList(columns, SampleTable(samples)), None, 3, 320, ShardSize())
    small = sum(min(sample.image.size, int(320 * 320 / 3)) for sample in order)
    assert resized.estimated_bytes == small + masks + 2 * 1024 * len(order)


def test_splits_are_parts_of_one_table(storage: str) -> None:
    samples = many(60)
    parts = hold_out(SampleList([], SampleTable(samples)), 0.3)
    assert list(parts[VAL].samples) == [sample for sample in samples if key_position(sample.key) < 0.3]
    assert list(parts[TRAIN].samples) == [sample for sample in samples if key_position(sample.key) >= 0.3]


def test_a_sample_takes_48_bytes_and_its_path() -> None:
    names = [f"n{place // 1300:08d}/n{place // 1300:08d}_{place}.JPEG" for place in range(70_000)]
    table = SampleTable(Sample(sample_key(name[:-5]), FileRef("/data", name, None, 9), ("x",)) for name in names)
    table._pack()
    assert table._samples.size + table._text.size == 48 * len(names) + sum(map(len, names))


def test_keys_are_percent_encoded() -> None:
    for byte in range(1, 256):
        name = os.fsdecode(bytes([byte]))
        assert sample_key(name) == quote(bytes([byte]), safe="").replace(".", "%2E").replace("~", "%7E")


def test_a_full_disk_for_the_list_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.growing, "SPILL_AT", 1)
    with small_disk(tmp_path / "small", "64k") as folder:
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        with pytest.raises(ShardError, match=f"list of samples to {folder}: No space left.*; set TMPDIR"):
            GrowingBytes().append(bytes(100_000))


def test_a_list_can_come_through_a_pipe(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("\ufeffa/1.jpg\r\n\nb/1.jpg\n",))
    writer.start()
    listing = list_lines(tmp_path / "pipe", make_resolver(tmp_path), "auto")
    writer.join()
    assert [(sample.key, sample.labels) for sample in listing.samples] == [("a%2F1", ("a",)), ("b%2F1", ("b",))]


def test_more_shards_than_names_have_digits_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.plan, "MAX_SHARDS", 5)
    table = SampleTable(Sample(f"{n}", FileRef("/data", f"{n}.jpg", None, 10**8), ()) for n in range(10))
    with pytest.raises(ShardError, match=r"10 shards of 64 MB are too many, at most 5: use --shard-mb 201 or more"):
        plan_shards(SampleList([], table), None, 0, None, ShardSize())
    assert plan_shards(SampleList([], table), None, 0, None, ShardSize(201, min_shards=1)).shards == 5
